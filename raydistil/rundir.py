"""The directory of a run: which run it belongs to, what each stage left there."""

import fcntl
import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from raydistil.checkpoint import CheckpointStore
from raydistil.config import Config, digest, flatten, result_hash, result_part
from raydistil.errors import StorageError
from raydistil.storage import remove_leftovers, whole_file

CONFIG = "config.json"
REPORT = "report.json"
TEACHER = "teacher"  # fine-tuned
STUDENT_INIT = "student_init"  # before training
DISTILLED = "distilled"
DISTILL = "distill"  # the stage that makes it
NO_TEACHER = "no-teacher"  # the same student, trained on the labels alone; its learning rate follows
STUDENT = "student"  # exported
LOCK = ".lock"
CHECKPOINTS = "checkpoints"  # of the stages that are being trained, where they have no place of their own

_held: dict[Path, TextIO] = {}  # locks of this process


def claim(config: Config, data: str) -> Path:
    """The run's directory, made if need be. `data` stands for the content of its token store.

    Raises StorageError if it belongs to a run whose result is defined otherwise, or if somebody is at work there.
    """
    path = config.run_dir
    _hold(path)
    remove_leftovers(path)
    kept = path / CONFIG
    if kept.exists() and _has_results(path):
        before = json.loads(kept.read_text())
        if before["hash"] != result_hash(config) or before.get("data") != data:
            changes = _changes(before["config"], config) or "the content of the corpus has changed since"
            raise StorageError(
                f"expected {path} to be this run's, but it holds another one ({changes}): "
                f"choose another with --set name=..., or remove it"
            )
    path.mkdir(parents=True, exist_ok=True)
    write_json(kept, {"hash": result_hash(config), "data": data, "config": config.model_dump(mode="json")})
    return path


def _hold(path: Path) -> None:
    """Keep others out until this process ends, however it does."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if path.resolve() in _held:
            return
        file = (path / LOCK).open("a+", encoding="utf8")
    except OSError as error:
        raise StorageError(
            f"expected a directory that can be written at {path}, got {error}: set output_dir or name to another"
        ) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        with file:
            file.seek(0)
            holder = file.read() or "somebody"
        raise StorageError(
            f"expected nobody at work in {path}, but {holder} is: wait for its end, or choose "
            f"another directory with --set name=..."
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _held[path.resolve()] = file


def _has_results(path: Path) -> bool:
    """Whether a stage has left anything: a run that failed before is no reason to refuse its mended configuration."""
    kept = any((path / name).exists() for name in (TEACHER, STUDENT_INIT, DISTILLED, STUDENT, CHECKPOINTS))
    return kept or any(path.glob("assistant-*")) or any(path.glob("*-general*"))


def _changes(before: dict[str, Any], config: Config) -> str:
    """The first few keys that define the result and differ."""
    now = flatten(result_part(config))
    then = flatten(before)
    changed = [key for key in now if now[key] != then.get(key)]
    shown = ", ".join(f"{key}: {then.get(key)!r} there, {now[key]!r} here" for key in changed[:3])
    return shown + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")


def write_json(path: Path, value: Any) -> None:
    """Atomically. Raises FullError when the disk is full; the previous file is then intact."""
    with whole_file(path) as scratch:
        scratch.write_text(json.dumps(value, indent=1, default=str) + "\n")


def run_hash(config: Config, data: str, teachers: list[dict[str, Any]]) -> str:
    """16 hex digits over what defines the result. `data` stands for the content of the token store, `teachers` for
    what those say that a stage learns from."""
    return digest([result_hash(config), data, *teachers])


def numbered(name: str, number: int) -> str:
    """`name` for the first teacher; `name-2` and so on for those beside it."""
    return name if number == 0 else f"{name}-{number + 1}"


def targets_of(stage: str, number: int) -> str:
    """The name under which stands what was kept of a teacher's targets for `stage`."""
    return numbered("targets" if stage == DISTILL else f"{stage}-targets", number)


def checkpoints_of(config: Config, stage: str) -> CheckpointStore:
    """Where those of a stage are while it is being trained."""
    place = config.checkpoints.storage
    if place is None:
        return CheckpointStore(str(config.run_dir.resolve() / CHECKPOINTS), stage)
    return CheckpointStore(place, f"{config.name}/{stage}")


def write_summary(run_dir: Path, stage: str, figures: dict[str, Any]) -> None:
    write_json(run_dir / f"{stage}.json", figures)


def read_summary(run_dir: Path, stage: str) -> dict[str, Any] | None:
    path = run_dir / f"{stage}.json"
    return json.loads(path.read_text()) if path.exists() else None


def read_config(run_dir: Path) -> dict[str, Any] | None:
    """The resolved configuration that `claim` left there; None where it was not, as in a model's directory."""
    found = _claimed(run_dir)
    return dict(found["config"]) if {"hash", "config"} <= found.keys() else None


def data_of(run_dir: Path) -> str | None:
    """The name of the token store that a run was made from; None where there is no run."""
    return _claimed(run_dir).get("data")


def _claimed(run_dir: Path) -> dict[str, Any]:
    """What `claim` wrote, or whatever else is there under that name."""
    path = run_dir / CONFIG
    with suppress(ValueError):
        return dict(json.loads(path.read_text())) if path.exists() else {}
    return {}


def read_report(run_dir: Path) -> dict[str, Any]:
    """The report as far as there is one."""
    path = run_dir / REPORT
    return json.loads(path.read_text()) if path.exists() else {}
