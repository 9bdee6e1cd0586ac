"""Student workers join and leave while they train, and no position is lost or trained on twice."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from settings import write

from raydistil import rundir
from raydistil.bench.nodes import PART, STORE_BYTES, Nodes, head_node
from raydistil.trace import Record, audit, history, read_trace


def patiently(condition: Callable[[], bool], driver: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def end(driver: "subprocess.Popen[bytes]") -> None:
    """By a signal it saves a checkpoint upon; if it does not, at once."""
    driver.terminate()
    try:
        driver.wait(120)
    finally:
        driver.kill()


def preempt(nodes: Nodes, node: Any) -> None:
    """Tell the cluster that it will go in a while, as a cloud does of what it takes back."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={nodes.address}"]
    reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=preempted"]
    subprocess.run([*command, *reason, f"--node-id={node.node_id}", "--deadline-remaining-seconds=60"], check=True)


@pytest.mark.long
def test_a_second_worker_joins_and_is_preempted(tiny_teacher: str, corpus_file: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "run.toml", {
        "output_dir": str(tmp_path), "task": "mlm", "corpus.source": str(corpus_file), "tokens.length": 16,
        "teacher.model": tiny_teacher, "student.layers": [0, 2], "distill.epochs": 2000,
        "distill.micro_batch_size": 16, "distill.zero_stage": 2,
        "cluster.trace": True, "cluster.students": [1, 2], "cluster.student_threads": 1, "cluster.teacher_threads": 1,
        "cluster.student_label_selector": {PART: "student"}, "cluster.teacher_label_selector": {PART: "teacher"},
    })  # fmt: skip

    def records() -> list[Record]:
        return read_trace(tmp_path / "run", rundir.DISTILL)

    with head_node(STORE_BYTES, {}) as cluster:
        nodes = Nodes(cluster, ("student", "teacher"), 1)
        command = [sys.executable, "-m", "raydistil", "distill", str(config)]
        environment = dict(os.environ) | {"RAY_ADDRESS": nodes.address}
        with (tmp_path / "said").open("w") as said:
            driver = subprocess.Popen(command, env=environment, stderr=said)
        try:
            patiently(lambda: len(records()) > 20, driver)
            second = nodes.add("student")
            patiently(lambda: len({record.began_s for record in records()}) == 2, driver)
            last = max(record.step for record in records())
            preempt(nodes, second)
            patiently(lambda: max(record.step for record in records()) > last + 20, driver)
            nodes.lose(-1)
            patiently(lambda: len({record.began_s for record in records()}) == 3, driver)
        finally:
            end(driver)
    lines = (tmp_path / "said").read_text()
    assert driver.returncode == 130 and "will go: saving a checkpoint" in lines
    assert "room for 2 student workers in place of 1" in lines and lines.count("the workers died") == 1
    traced = records()
    expected = 2 * max(record.step for record in history(traced))  # a step is what two workers make, whoever does
    found = audit(traced, expected)
    assert (found.lost, found.duplicated) == ([], [])
    ranks = {
        began: len({path for path in tmp_path.glob("run/*-trace-*.jsonl") if str(began) in path.read_text()})
        for began in {record.began_s for record in traced}
    }
    assert [ranks[began] for began in sorted(ranks)] == [1, 2, 1]
    assert max(record.from_step for record in traced) >= last  # the checkpoint that followed the notice
