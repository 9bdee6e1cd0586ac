"""How many replicas there are to be."""

from types import SimpleNamespace
from typing import Any

import pytest

from raydistil.serve import scaling
from raydistil.serve.batcher import Load
from raydistil.serve.scaling import BUSY, SHARE, WAIT_S, WORK, Stats, by_work, settings


def context(work_s: list[float], busy: list[float], requests: float = 1.0) -> Any:
    names = [f"replica-{n}" for n in range(len(work_s))]
    metrics = {WORK: dict(zip(names, work_s, strict=True)), SHARE: dict(zip(names, busy, strict=True))}
    return SimpleNamespace(aggregated_metrics=metrics if work_s else None, total_num_requests=requests)


@pytest.mark.parametrize(
    ("work_s", "busy", "requests", "expected"),
    [
        ([], [], 0, 0),  # nothing is known, nobody asks
        ([], [], 3, 1),
        ([0.0], [0.0], 0, 0),
        ([0.0], [0.01], 0, 1),
        ([0.9 * WAIT_S], [0.7], 1, 1),
        ([1.1 * WAIT_S], [1.0], 1, 2),
        ([3.9 * WAIT_S], [1.0], 1, 4),
        ([0.0, 0.0], [0.5 * BUSY, 0.6 * BUSY], 1, 2),  # together more than one could do
        ([0.0, 0.0], [0.5 * BUSY, 0.4 * BUSY], 1, 1),
        ([2 * WAIT_S, WAIT_S], [1.0, 1.0], 1, 3),
    ],
)
def test_there_are_as_many_as_what_waits_and_what_is_done_ask_for(
    work_s: list[float], busy: list[float], requests: float, expected: int
) -> None:
    assert by_work(context(work_s, busy, requests)) == (expected, {})


def test_a_replica_says_how_busy_it_was_since_it_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(scaling, "time", SimpleNamespace(monotonic=lambda: now[0]))
    stats = Stats()
    for passed, busy_s, expected in ((2.0, 1.0, 0.5), (1.0, 1.0, 0.0), (1.0, 2.5, 1.0)):
        now[0] += passed
        found = stats.now(Load(0, 0, 0, 10.0, 0.7, busy_s))
        assert found == {WORK: 0.7, SHARE: pytest.approx(expected)}


def test_serve_takes_the_policy() -> None:
    from ray.serve.config import AutoscalingConfig

    config = AutoscalingConfig(**settings(0, 3, 45.0))
    assert (config.min_replicas, config.max_replicas, config.downscale_delay_s) == (0, 3, 45.0)
    policy = config.policy.get_policy()
    decided, _ = policy(_serves(config))
    assert decided == 2


def _serves(config: Any) -> Any:
    """The context that Serve makes."""
    from ray.serve._private.common import DeploymentID
    from ray.serve.config import AutoscalingContext

    return AutoscalingContext(
        deployment_id=DeploymentID("student", "raydistil"), deployment_name="student", app_name="raydistil",
        current_num_replicas=1, target_num_replicas=1, running_replicas=[], total_num_requests=9.0,
        total_queued_requests=0.0, aggregated_metrics={WORK: {"a": 1.5 * WAIT_S}, SHARE: {"a": 1.0}}, raw_metrics={},
        capacity_adjusted_min_replicas=0, capacity_adjusted_max_replicas=3, policy_state={},
        last_scale_up_time=None, last_scale_down_time=None, current_time=None, config=config,
    )  # fmt: skip
