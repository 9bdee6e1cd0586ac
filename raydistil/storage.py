"""Where files go: the cache, and directories that appear whole or not at all.

What is not whole yet bears the name of the process that makes it, so that whoever comes after one that was killed knows
what nobody will finish.
"""

import errno
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import psutil

from raydistil.errors import FullError, StorageError

# What safetensors, numpy.save and torch.save say of a full disk, none of which sets errno.
DISK_FULL = re.compile(r"No space left on device|\d+ requested and \d+ written|unexpected pos \d+ vs \d+")

LEFT = re.compile(r"\.(?P<name>.+)\.(?P<kind>new|old)\.(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}")
ABANDONED_S = 24 * 3600.0  # what another machine's process has not touched for so long


def cache_dir() -> Path:
    """RAYDISTIL_CACHE, else `raydistil` in the user's cache directory."""
    chosen = os.environ.get("RAYDISTIL_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raydistil"


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A scratch directory beside `target` that takes its place when the block ends well.

    Whatever stood at `target` before stays untouched until then, and for good if the block raises.
    Raises FullError when the disk is full, StorageError where nothing can be written.
    """
    scratch = _beside(target, "new")
    try:
        _make(scratch, target)
        yield scratch
        _replace(scratch, target)
    except Exception as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if is_disk_full(error):
            raise _disk_full(target) from error
        raise
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A scratch file beside `target` that takes its place when the block ends well.

    Raises FullError when the disk is full, StorageError where nothing can be written.
    """
    scratch = _beside(target, "new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        scratch.replace(target)
    except OSError as error:
        if is_disk_full(error):
            raise _disk_full(target) from error
        raise StorageError(f"expected a place to write {target}, got {error}: choose another directory") from error
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def scratch_directory(beside: Path | None = None) -> Iterator[Path]:
    """One that is gone when the block ends; by the side of another, or where temporary ones are."""
    path = _beside(beside or Path(tempfile.gettempdir(), "raydistil"), "new")
    remove_leftovers(path.parent)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Finish, or else remove, what processes that are no more left in `folder`."""
    for path in folder.glob(".*") if folder.is_dir() else ():
        found = LEFT.fullmatch(path.name)
        if found is None or not _abandoned(path, found["host"], int(found["pid"])):
            continue
        target = path.with_name(found["name"])
        if found["kind"] == "old" and not target.exists():
            path.rename(target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _abandoned(path: Path, host: str, pid: int) -> bool:
    if host == socket.gethostname():
        return not psutil.pid_exists(pid)
    with suppress(OSError):
        return time.time() - path.stat().st_mtime > ABANDONED_S
    return False


def _beside(target: Path, kind: str) -> Path:
    """A name of this process's alone. `new`: what will be at `target`. `old`: what was."""
    return target.with_name(f".{target.name}.{kind}.{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}")


def _make(scratch: Path, target: Path) -> None:
    remove_leftovers(target.parent)
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise StorageError(f"expected a place to write {target}, got {error}: choose another directory") from error


def _replace(scratch: Path, target: Path) -> None:
    """Put `scratch` in the place of `target`, or leave `target` as it is."""
    if not target.exists():
        scratch.rename(target)
        return
    old = _beside(target, "old")
    target.rename(old)
    try:
        scratch.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or one it came from, says that no space is left (some only say so in words)."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if DISK_FULL.search(str(seen)):
            return True
        seen = seen.__cause__
    return False


def free_bytes(path: Path) -> int:
    """Where `path` is, or would be."""
    path = path.absolute()
    return shutil.disk_usage(next(part for part in (path, *path.parents) if part.exists())).free


def _disk_full(target: Path) -> FullError:
    free = free_bytes(target.parent) / 2**20
    kept = "the previous one is intact" if target.exists() else "nothing was left there"
    return FullError(f"no space left while writing {target} ({free:.0f} MiB free); {kept}: free some and run again")


def mebibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
