"""Processes that are ours: those of a cluster that was started here bear a mark, which says by whom.

Nothing of them outlives a run that ends; what outlives one that was killed ends with the next start.
"""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import psutil

MARK = "RAYDISTIL_CLUSTER"  # in the environment of every process of a cluster that was started here
END_S = 15.0


def new_mark() -> str:
    """Of a cluster that this process starts."""
    return f"{os.getpid()}-{_started(os.getpid())}-{uuid4().hex}"


def _started(pid: int) -> str:
    """When it was: by Linux in ticks since the machine's start, which no setting of its clock changes.

    Raises OSError or psutil.Error where it is gone.
    """
    if Path("/proc/self/stat").exists():
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # its 22nd field
    return f"{psutil.Process(pid).create_time():.2f}"


def _namespace(pid: int) -> str:
    """In which its number is its number: a container's processes have others, too, as seen from outside."""
    with suppress(OSError):
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    return ""


def wait_for_the_end(mark: str) -> None:
    """Ray's workers end a while after it; whatever outlives `END_S` is killed, so that the last line is the last."""
    deadline = time.monotonic() + END_S
    while left := [process for process, found in _marked() if found == mark]:
        if time.monotonic() > deadline:
            _kill(left)
            return
        time.sleep(0.1)


def end_leftovers() -> None:
    """End what was started by processes that are no more."""
    _kill([process for process, mark in _marked() if not _starter_lives(mark)])


def _marked() -> Iterator[tuple[psutil.Process, str]]:
    """(process, mark) of all but this one; what has ended and waits to be reaped is not among them."""
    here = _namespace(os.getpid())
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # another user's, or gone
            mark = process.environ().get(MARK)
            if mark and process.pid != os.getpid() and _namespace(process.pid) == here:
                yield process, mark


def _starter_lives(mark: str) -> bool:
    pid, started, _ = mark.split("-")
    with suppress(psutil.Error, OSError):
        return _started(int(pid)) == started
    return False


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
