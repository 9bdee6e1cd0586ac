"""Student workers that join and leave: how many there are to be, and when they may change.

Ray Train's own policy counts room on whatever nodes; here it is that on nodes which students may run on and which are
there to stay, less what the teachers need. And nobody is stopped before there is a checkpoint to go on from.
"""

import math
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from raydistil.checkpoint import CheckpointStore
from raydistil.plan import READ_CPUS, Need, matches
from raydistil.progress import Wish


class Elastic(ElasticScalingPolicy):
    """Runs in Ray Train's controller. `need`: of the run with the fewest student workers."""

    def __init__(self, scaling: Any, need: Need, store: CheckpointStore, progress: Any) -> None:
        super().__init__(scaling)
        self._need, self._store, self._progress = need, store, progress
        self._wanted: ResizeDecision | None = None
        self._before: str | None = None  # the newest checkpoint when it was wanted
        self._running = 0

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """Those there are, and those there is room for beside them; where none are, and what is left of those there
        were still holds its room, all that there is room for."""
        draining, free = ray._private.state.state.get_draining_nodes(), available_resources_per_node()
        nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
        stay = [node for node in nodes if matches(self._need.student_on, node.get("Labels", {}))]
        more = sum(self._fit(free.get(node["NodeID"], {}) if self._running else node["Resources"]) for node in stay)
        whole = {kind: sum(node["Resources"].get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
        rest = {
            "CPU": whole["CPU"] - self._need.teachers * self._need.teacher_cpus - READ_CPUS,
            "GPU": whole["GPU"] - self._need.teachers * self._need.teacher_gpus,
        }
        return min(self._running + more, self._fit(rest), self.scaling_config.max_workers)

    def _fit(self, free: dict[str, float]) -> int:
        """Workers that so much of a node, or of all of them, holds."""
        by_gpus = free.get("GPU", 0.0) // self._need.student_gpus if self._need.student_gpus else math.inf
        return int(min(free.get("CPU", 0.0) // self._need.student_cpus, by_gpus))

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        try:
            return self._decision(worker_group_state, worker_group_status)
        except OSError:  # a store that does not answer for a moment
            return NoopDecision()

    def _decision(self, worker_group_state: Any, worker_group_status: Any) -> ScalingDecision:
        if self._wanted is None:
            self._running = worker_group_state.num_workers
            found = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
            if not isinstance(found, ResizeDecision):
                return found
            self._before = self._newest()
            self._wanted = found
            news = f"there is room for {found.num_workers} student workers in place of {self._running}"
            self._progress.tell.remote(news)
            self._progress.wish.remote(Wish.SAVE)
        if self._newest() == self._before:
            return NoopDecision()
        wanted, self._wanted = self._wanted, None
        self._progress.resize.remote()
        return wanted

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._wanted, self._running = None, 0
        return super().make_decision_for_non_running_worker_group()

    def _newest(self) -> str | None:
        kept = self._store.newest()
        return kept.name if kept else None


class ElasticTrainer(TorchTrainer):
    """With `policy`, where there is one, in the place of Ray Train's own."""

    policy: Elastic | None = None

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        inherited: Any = super()  # of Train V2, whose types are hidden
        own = {"scaling_policy": self.policy} if self.policy else {}
        return inherited._initialize_and_run_controller(**given | own)
