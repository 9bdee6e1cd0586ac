"""Ray clusters of several nodes on this machine, for benchmarks; of some, any node can be lost.

A node's processes all die at once and without a word, as if its machine had lost its power.
"""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from ray._common.utils import get_ray_address_file
from ray.cluster_utils import Cluster

from raydistil.processes import MARK, new_mark, wait_for_the_end

PART = "raydistil-part"  # label of a node: what runs there
STORE_BYTES = 256 << 20


class Nodes:
    """Nodes of the parts that are asked for, beside the head; the same again for one that is lost."""

    def __init__(self, cluster: Cluster, parts: tuple[str, ...], cpus: int) -> None:
        self._cluster, self._cpus = cluster, cpus
        self._nodes: list[tuple[str, Any]] = []
        for part in parts:
            self.add(part)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def workers(self, title: str) -> list[psutil.Process]:
        """Ray's workers of the nodes whose name begins so, oldest first."""
        raylets = [_raylet(node) for _, node in self._nodes]
        found = [child for raylet in raylets for child in raylet.children() if _title(child).startswith(title)]
        return sorted(found, key=lambda process: process.create_time())

    def add(self, part: str) -> Any:
        """One more node."""
        node = self._cluster.add_node(num_cpus=self._cpus, object_store_memory=STORE_BYTES, labels={PART: part})
        self._nodes.append((part, node))
        return node

    def replace(self, number: int) -> str:
        """Lose one of the nodes; another one takes its place. Returns what its part was."""
        part = self.lose(number)
        self.add(part)
        return part

    def lose(self, number: int) -> str:
        """One of the nodes, and what ran there. Returns what its part was."""
        part, node = self._nodes.pop(number % len(self._nodes))
        raylet = _raylet(node)
        raylet.suspend()  # so that it reports nothing of what it loses
        for process in (*raylet.children(recursive=True), raylet):
            with suppress(psutil.NoSuchProcess):
                os.kill(process.pid, signal.SIGKILL)
        self._cluster.remove_node(node, allow_graceful=False)
        return part


@contextmanager
def head_node(store_bytes: int, labels: dict[str, str]) -> Iterator[Cluster]:
    """A cluster with two logical CPUs, which others can be added to. It ends with the block, and leaves no trace."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    mark = os.environ[MARK] = new_mark()
    shape = {"num_cpus": 2, "object_store_memory": store_bytes, "labels": labels, "include_dashboard": False}
    with _address_of_others():
        cluster = Cluster(initialize_head=True, head_node_args=shape)
        try:
            yield cluster
        finally:
            cluster.shutdown()
            del os.environ[MARK]
            wait_for_the_end(mark)


@contextmanager
def _address_of_others() -> Iterator[None]:
    """What `address = "auto"` stands for on this machine is as before after the block."""
    path = Path(get_ray_address_file(None))
    before = path.read_text() if path.exists() else None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_text(before)


def _raylet(node: Any) -> psutil.Process:
    (info,) = node.all_processes["raylet"]
    return psutil.Process(info.process.pid)


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
