"""Scheduling policies: inherited by what is started behind, taken back by who is to be in front."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from raydistil import turns

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux's policies")
OWN = "import os; print(os.sched_getscheduler(0))"
FRONT = "from raydistil import turns; turns.in_front(); " + OWN


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    """Each test in a state that it leaves as it was."""
    before = os.sched_getscheduler(0)
    assert before == os.SCHED_OTHER, "the tests are run under the usual policy"
    yield
    assert os.sched_getscheduler(0) == before


def started(code: str) -> int:
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_what_is_started_behind_stays_there_until_it_comes_forward() -> None:
    with turns.behind():
        assert (started(OWN), started(FRONT)) == (os.SCHED_BATCH, os.SCHED_OTHER)
    assert started(OWN) == os.SCHED_OTHER


def test_whom_its_user_put_elsewhere_is_left_there() -> None:
    def put_last() -> tuple[int, int, int]:
        turns.last()
        with turns.behind():
            inside = os.sched_getscheduler(0)
        turns.in_front()
        return inside, os.sched_getscheduler(0), started(FRONT)

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(put_last).result() == (os.SCHED_IDLE,) * 3
