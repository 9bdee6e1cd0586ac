"""The Ray cluster of a run: found or started, checked for size, and left as it was."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raydistil.config.cluster import ClusterConfig
from raydistil.errors import PlanError
from raydistil.plan import Need, Node, check_fits, check_placed, local_cpus
from raydistil.processes import MARK, end_leftovers, new_mark, wait_for_the_end
from raydistil.raylet import LOG, kept_in
from raydistil.turns import behind

# For every Ray process this run starts. Ray Data sizes its thread pools for large machines unless told; Ray runs its
# workers at niceness 15, where anything else on the machine starves a training that waits for its own threads; and Ray
# Train looks every two seconds whether a training is over, and starts an actor that watches for preemptions, of which
# nothing here wants to know. Idle workers that Ray starts beforehand have an environment that no actor asks for. Nobody
# reads what its log monitor finds ten times a second, nor what its dashboard's agent says of every process.
# Ray's agents write their titles over their environment, where the mark stands that says whose they are, unless told.
# glibc gives large blocks back to the system and faults in fresh pages for the next step's: kept, in one arena.
ENVIRONMENT = {
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_DATA_MAX_FORMAT_THREADPOOL_NUM_WORKERS": "1",
    "RAY_DATA_DEFAULT_COLLATE_FN_THREADPOOL_MAX_WORKERS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "10",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "SPT_NOENV": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
HANGS = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"


@contextmanager
def cluster(config: ClusterConfig, needs: list[Need], folder: Path) -> Iterator[None]:
    """Connected to a cluster that can hold every one of `needs`, in turn. A cluster started here ends with the block.

    `folder`: for what Ray says meanwhile. Raises PlanError where the cluster is too small.
    """
    with kept_in(folder / LOG), behind(), connected(config):
        check_room(needs)
        yield


@contextmanager
def connected(config: ClusterConfig) -> Iterator[None]:
    """Connected to Ray: as it is already, to the cluster at the address, or to one started here for the block."""
    import ray

    os.environ[HANGS] = str(config.hang_timeout_s)  # before anything starts: Ray Train hands it on to its actors
    if ray.is_initialized():
        yield
        return
    _quiet()
    end_leftovers()
    mark = new_mark()
    try:
        _start(config, address_of(config), mark)
        yield
    finally:
        ray.shutdown()
        wait_for_the_end(mark)
        os.environ.pop(MARK, None)


def address_of(config: ClusterConfig) -> str | None:
    """Of the cluster to join; None: one is started here."""
    return config.address or os.environ.get("RAY_ADDRESS") or None


def _start(config: ClusterConfig, address: str | None, mark: str) -> None:
    import ray

    from raydistil import warm

    os.environ.update(environment())
    if address is not None:
        try:
            ray.init(address, runtime_env={"env_vars": ENVIRONMENT}, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise PlanError(f"expected a Ray cluster at {address}, could not connect: {error}") from error
        return
    os.environ[MARK] = mark
    with _uninterrupted():
        ray.init(
            address="local", num_cpus=local_cpus(), object_store_memory=config.object_store_bytes,
            include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
            runtime_env={"env_vars": environment(), "worker_process_setup_hook": warm.HOOK},
        )  # fmt: skip
    warm.with_cluster()


def environment() -> dict[str, str]:
    """`ENVIRONMENT`, where the user's own says nothing else."""
    return {key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()}


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C takes effect after the block: a Ray stopped halfway into its start leaves processes behind for a while."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def check_before_start(config: ClusterConfig, needs: list[Need]) -> None:
    """Raise PlanError where a cluster that would be started here cannot hold one of `needs`."""
    import ray
    import torch

    if ray.is_initialized() or address_of(config) is not None:
        return
    for need in needs:
        check_fits(need, local_cpus(), torch.cuda.device_count(), local_cpus())


def check_room(needs: list[Need]) -> None:
    """Raise PlanError where the cluster, as it is now, cannot hold one of `needs`."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [
        Node(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0), node.get("Labels", {}))
        for node in alive
    ]
    largest = max((node.cpus for node in nodes), default=0.0)
    for need in needs:
        check_fits(need, sum(node.cpus for node in nodes), sum(node.gpus for node in nodes), largest)
        check_placed(need, nodes)


def _quiet() -> None:
    """Ray's own progress and chatter off; errors stay."""
    for name in ("ray", "ray.train", "ray.tune", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
