"""What a training waits for at its start, begun while the driver is still at its own: on a cluster started here.

Ray starts what it needs in turn: the controller, the workers, their data set, its scheduler, and the teachers last;
each of them imports for seconds. Here Ray Data's own actors start with the cluster, and processes of the teachers and
of the readers import what they will need before anyone asks for them. Nothing depends on any of it.

A process that ran a task is never given to an actor, so those of the teachers are made for actors that end before their
process is there. Teachers with a GPU are left out: a process that looked for one before it got one keeps what it saw.
"""

import importlib
import os
import sys
import threading
import time
from typing import Any, Literal

import ray

from raydistil.config.cluster import ClusterConfig

Role = Literal["teacher", "reader"]
_ROLE = "RAYDISTIL_ROLE"
HOOK = f"{__name__}.preload"  # Ray calls it in every process that it starts
MODULES: dict[Role, tuple[str, ...]] = {
    "teacher": ("raydistil.models", "raydistil.targets", "ray.data"),
    "reader": ("raydistil.source", "ray.data"),
}
BEHIND = 10  # niceness
STARTS_S = 0.2  # long enough for a process to be on its way, too short for it to be there


def environment(role: Role) -> dict[str, dict[str, str]]:
    """The runtime environment by which Ray knows the processes of `role` apart."""
    passed = {key: value for key, value in os.environ.items() if key.startswith("RAY_TRAIN_")}
    passed["RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"] = "0"  # as Ray Train does, with the others, for all that it starts
    return {"env_vars": {**passed, _ROLE: role}}


def preload() -> None:
    """Import what the role of this process needs, behind whatever else wants the cores."""
    for role, modules in MODULES.items():
        if os.environ.get(_ROLE) == role:
            thread = threading.Thread(target=_import, args=(modules,))
            thread.start()
            thread.join()


def _import(modules: tuple[str, ...]) -> None:
    if sys.platform == "linux":  # where it is this thread's alone
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BEHIND)
    for module in modules:
        importlib.import_module(module)


def with_cluster() -> None:
    """Start Ray Data's actors, and a process that reads. Returns at once."""
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )
    from ray.data._internal.execution.node_trackers.actor_location import get_or_create_actor_location_tracker
    from ray.data._internal.stats import get_or_create_stats_actor

    get_or_create_autoscaling_coordinator()
    get_or_create_stats_actor()
    get_or_create_actor_location_tracker()
    remote: Any = ray.remote(num_cpus=0)(_nothing)
    remote.options(runtime_env=environment("reader")).remote()


def with_training(config: ClusterConfig, pools: int) -> None:
    """Start processes for the smallest `pools` of teachers."""
    hook = ray.get_runtime_context().runtime_env.get("worker_process_setup_hook")
    if not pools or config.teacher_gpus or hook != HOOK:
        return
    actor: Any = ray.remote(num_cpus=0)(_Nothing)
    nothings = [actor.options(runtime_env=environment("teacher")).remote() for _ in range(pools * config.teachers[0])]
    time.sleep(STARTS_S)
    for nothing in nothings:
        ray.kill(nothing)


class _Nothing: ...


def _nothing() -> None: ...
