"""The driver, the head node and the memory of a machine are lost, for real; the same command goes on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster
from settings import write
from test_failures import audited

from raydistil import rundir
from raydistil.bench.nodes import STORE_BYTES, Nodes, head_node
from raydistil.config import load_config
from raydistil.processes import MARK
from raydistil.trace import Record, read_trace

EPOCHS, PATIENCE_S = 40, 300.0
STUDENT, TEACHER = "ray::RayTrainWorker", "ray::MapWorker"


@pytest.fixture
def config(tiny_teacher: str, corpus_file: Path, tmp_path: Path) -> Path:
    return write(tmp_path / "run.toml", {
        "output_dir": str(tmp_path), "task": "mlm", "corpus.source": str(corpus_file), "tokens.length": 16,
        "teacher.model": tiny_teacher, "student.layers": [0, 2], "distill.epochs": EPOCHS,
        "distill.micro_batch_size": 16, "checkpoints.every_min": 0.05,
        "cluster.trace": True, "cluster.student_threads": 1, "cluster.teacher_threads": 1,
    })  # fmt: skip


def records(config: Path) -> list[Record]:
    return read_trace(config.with_suffix(""), rundir.DISTILL)


@contextmanager
def driver(config: Path, address: str | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    """`raydistil distill`, killed where it outlives the block; what it says is added to a file beside the run."""
    environment = {key: value for key, value in os.environ.items() if key not in (MARK, "RAY_ADDRESS")}
    environment |= {"RAY_ADDRESS": address} if address else {}
    with config.with_suffix(".said").open("a") as said:
        command = [sys.executable, "-m", "raydistil", "distill", str(config)]
        started = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
    try:
        yield started
    finally:
        started.kill()
        started.wait()


@contextmanager
def larger_cluster() -> Iterator[Cluster]:
    """A head, and one more node."""
    with head_node(STORE_BYTES, {}) as cluster:
        Nodes(cluster, ("any",), 2)
        yield cluster


def said(config: Path) -> str:
    return config.with_suffix(".said").read_text()


def patiently(condition: Callable[[], object], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def marked(pid: int) -> list[psutil.Process]:
    """The processes of the cluster that the driver `pid` has started."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK, "").startswith(f"{pid}-") and process.pid != pid:
                found.append(process)
    return found


def title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return "".join(process.cmdline()).strip()
    return ""  # it has just ended


@pytest.mark.alone
def test_what_a_killed_driver_leaves_behind_ends_with_the_next_start(config: Path) -> None:
    with driver(config) as first:
        patiently(lambda: any(record.step > 60 for record in records(config)), first)
        first.send_signal(signal.SIGKILL)
        first.wait()
        titles = {title(process) for process in marked(first.pid)}
    assert "ray::DashboardAgent" in titles  # one that would outlive the others
    with driver(config) as second:
        assert second.wait(PATIENCE_S) == 0, said(config)
    assert not marked(first.pid) and not marked(second.pid)
    audited(load_config(config, []))


@pytest.mark.long
def test_a_run_whose_head_node_is_lost_ends_and_goes_on_with_another(config: Path) -> None:
    with larger_cluster() as cluster, driver(config, str(cluster.address)) as first:
        patiently(lambda: any(record.step > 60 for record in records(config)), first)
        for kind in ("raylet", "gcs_server"):
            (info,) = cluster.head_node.all_processes[kind]
            os.kill(info.process.pid, signal.SIGKILL)
        assert first.wait(PATIENCE_S) not in (0, 2)
    with larger_cluster() as cluster, driver(config, str(cluster.address)) as second:
        assert second.wait(PATIENCE_S) == 0, said(config)
    assert any(record.from_step for record in records(config))
    audited(load_config(config, []))


def workers() -> set[int]:
    """Of teachers and students, on the cluster of this process."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError, IndexError):
            if process.environ().get(MARK) == os.environ[MARK] and process.cmdline()[0].startswith((STUDENT, TEACHER)):
                found.add(process.pid)
    return found


@pytest.mark.long
def test_what_is_killed_for_its_memory_is_started_again(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray, which kills a worker before the machine's memory is full; here that is what it has in use and some more.
    Another process takes it."""
    memory, room = psutil.virtual_memory(), 8 << 30
    if memory.available < room + (2 << 30):
        pytest.skip("needs 10 GiB of memory")
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{(memory.total - memory.available + room) / memory.total:.3f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    with larger_cluster() as cluster, driver(config, str(cluster.address)) as run:
        patiently(lambda: any(record.step > 60 for record in records(config)), run)
        before, taken = workers(), list[bytearray]()
        assert len(before) == 2

        def someone_is_killed() -> bool:
            taken.append(bytearray(os.urandom(1 << 20) * 256))
            return not before <= workers()

        patiently(someone_is_killed, run)
        taken.clear()
        assert run.wait(PATIENCE_S) == 0, said(config)
    audited(load_config(config, []))
