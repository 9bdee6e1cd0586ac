"""The head of a cluster is lost, and with it all that Ray knows: the same command goes on at another one.

Its checkpoints are in an object store, as they would be of machines that come and go.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster
from settings import write

from raydistil import rundir
from raydistil.bench.nodes import STORE_BYTES, Nodes, head_node
from raydistil.config import load_config
from raydistil.trace import audit, read_trace

EXPECTED_S = 240


def lose_head(cluster: Cluster) -> None:
    """All of its processes at once, as if its machine had lost its power."""
    found = [psutil.Process(one.process.pid) for kind in cluster.head_node.all_processes.values() for one in kind]
    for process in [child for parent in found for child in parent.children(recursive=True)] + found:
        with suppress(psutil.NoSuchProcess):
            os.kill(process.pid, signal.SIGKILL)


@pytest.mark.long
def test_the_head_is_lost_and_the_same_command_goes_on_at_another(
    tiny_teacher: str, corpus_file: Path, tmp_path: Path, bucket: str
) -> None:
    path = write(tmp_path / "run.toml", {
        "output_dir": str(tmp_path), "task": "mlm", "corpus.source": str(corpus_file), "tokens.length": 16,
        "teacher.model": tiny_teacher, "student.layers": [0, 2], "distill.epochs": 30,
        "distill.micro_batch_size": 16, "checkpoints.every_steps": 20, "checkpoints.storage": bucket,
        "cluster.trace": True, "cluster.student_threads": 1, "cluster.teacher_threads": 1,
    })  # fmt: skip
    config = load_config(path, [])

    def started(cluster: Cluster) -> "subprocess.Popen[str]":
        given = {"RAY_ADDRESS": Nodes(cluster, ("any",), 4).address, "RAY_gcs_rpc_server_reconnect_timeout_s": "10"}
        environment = dict(os.environ) | given
        command = [sys.executable, "-m", "raydistil", "distill", str(path)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    with head_node(STORE_BYTES, {}) as cluster:
        driver, deadline = started(cluster), time.monotonic() + EXPECTED_S
        while rundir.checkpoints_of(config, rundir.DISTILL).newest() is None:
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        lose_head(cluster)
        _, said = driver.communicate(timeout=EXPECTED_S)
        assert driver.returncode not in (0, 2), said
    with head_node(STORE_BYTES, {}) as cluster:
        driver = started(cluster)
        _, said = driver.communicate(timeout=EXPECTED_S)
        assert driver.returncode == 0, said
    summary = rundir.read_summary(config.run_dir, rundir.DISTILL)
    assert summary is not None and config.distill is not None
    records = read_trace(config.run_dir, rundir.DISTILL)
    found = audit(records, -(-summary["rows"] // 16) * config.distill.epochs)
    assert (found.lost, found.duplicated, found.trained) == ([], [], found.expected)
    assert {record.from_step for record in records} > {0}
    assert not (config.run_dir / "checkpoints").exists()  # they were nowhere but in the bucket
