"""What a killed run left running ends with the next start; what others run is left alone."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from raydistil import rundir
from raydistil.errors import StorageError
from raydistil.processes import MARK, end_leftovers, new_mark, wait_for_the_end

SLEEPS = [sys.executable, "-c", "import time; time.sleep(600)"]
# Starts a sleeper with a mark of its own, says who it is, and is killed.
STARTER = f"""
import os, signal, subprocess
from raydistil.processes import MARK, new_mark
env = dict(os.environ) | {{MARK: new_mark()}}
print(subprocess.Popen({SLEEPS!r}, env=env, stdout=subprocess.DEVNULL).pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def sleeper(mark: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(SLEEPS, env=dict(os.environ) | {MARK: mark})


def test_what_a_killed_process_started_is_ended() -> None:
    own, other = sleeper(new_mark()), subprocess.Popen(SLEEPS)
    started = subprocess.run([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True, check=False)
    orphan = psutil.Process(int(started.stdout))
    try:
        end_leftovers()
        orphan.wait(timeout=20)
        assert own.poll() is None and other.poll() is None
    finally:
        for process in (own, other):
            process.kill()
            process.wait()


def test_a_process_that_has_another_ones_number_is_not_taken_for_it() -> None:
    pid, started, name = new_mark().split("-")
    process = sleeper(f"{pid}-{float(started) - 60:g}-{name}")
    end_leftovers()
    assert process.wait(timeout=20) < 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="elsewhere a process keeps the time of its start")
def test_a_clock_that_is_set_makes_no_one_a_leftover(monkeypatch: pytest.MonkeyPatch) -> None:
    process = sleeper(new_mark())
    monkeypatch.setattr("psutil.Process.create_time", lambda self: 0.0)
    try:
        end_leftovers()
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_the_processes_of_a_container_are_left_alone() -> None:
    """Whose starter has another number there than here."""
    alone = ["unshare", "--pid", "--fork", "--kill-child"]
    if shutil.which(alone[0]) is None or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("needs the right to make a namespace of processes")
    outer = subprocess.Popen([*alone, "env", f"{MARK}=999999999-1-0", *SLEEPS])
    try:
        while not (inner := [one for one in psutil.Process(outer.pid).children() if one.environ().get(MARK)]):
            assert outer.poll() is None
            time.sleep(0.05)
        end_leftovers()
        time.sleep(0.5)
        assert inner[0].status() != psutil.STATUS_ZOMBIE and outer.poll() is None
    finally:
        outer.kill()
        outer.wait()


def test_what_outlives_its_time_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydistil.processes.END_S", 0.3)
    mark = new_mark()
    process, began = sleeper(mark), time.monotonic()
    wait_for_the_end(mark)
    assert time.monotonic() - began > 0.3
    assert process.wait(timeout=20) < 0


HOLDER = """
import pathlib, sys, time
from raydistil import rundir
rundir._hold(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_one_process_at_a_time_works_in_a_directory(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(StorageError, match=f"expected nobody at work in .*, but process {holder.pid} on .* is"):
            rundir._hold(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    for _ in range(2):
        rundir._hold(tmp_path)
