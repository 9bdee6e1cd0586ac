"""Whose turn it is where there are more threads than cores, by the policies of Linux's scheduler; elsewhere nobody's.

Ray's processes wake up a thousand times a second, to look whether there is something to do. Each time one of a
student's threads is put off its core, and the others wait for it, since they share every product: more is lost than
Ray's processes take. So they come behind: they get a core when a student's thread lets go of one, or at the next tick.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def behind() -> Iterator[None]:
    """What is started in the block, and what that starts, puts no thread that is at work off its core.

    Nothing is changed for a process that is under another policy than the usual one: so its user wants it.
    """
    usual = hasattr(os, "SCHED_BATCH") and _own() == os.SCHED_OTHER
    if usual:
        _take(os.SCHED_BATCH)
    try:
        yield
    finally:
        if usual:
            _take(os.SCHED_OTHER)


def in_front() -> None:
    """Take this thread, and those it will start, out of `behind` (as which a user's own SCHED_BATCH is taken)."""
    if hasattr(os, "SCHED_BATCH") and _own() == os.SCHED_BATCH:
        _take(os.SCHED_OTHER)


def last() -> None:
    """This thread, and those it will start, get what no other one wants."""
    if hasattr(os, "SCHED_IDLE"):
        _take(os.SCHED_IDLE)


def _own() -> int | None:
    """This thread's policy; None in a sandbox that does not say."""
    with suppress(OSError):
        return os.sched_getscheduler(0)
    return None


def _take(policy: int) -> None:
    with suppress(OSError):  # nor let one choose
        os.sched_setscheduler(0, policy, os.sched_param(0))
