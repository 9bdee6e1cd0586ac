"""How many replicas: as many as can do what waits within `WAIT_S`, and are at work for `BUSY` of their time at most.

Ray Serve asks each replica for its `Stats` and calls `by_work` with those of all, averaged over `LOOK_BACK_S`; delays
and bounds are Serve's own.
"""

import math
import time
from typing import TYPE_CHECKING, Any

from raydistil.serve.batcher import Load

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

WAIT_S = 0.25
BUSY = 0.8
LOOK_BACK_S = 3.0
UP_S = 1.0  # as long must more be wanted
WORK, SHARE = "work_s", "busy"


class Stats:
    """Of one replica: seconds of work that it has, its queued tokens at its measured rate, and how busy it is."""

    def __init__(self) -> None:
        self._before = (time.monotonic(), 0.0)

    def now(self, load: Load) -> dict[str, float]:
        at, busy_s = time.monotonic(), load.busy_s
        since, before_s = self._before
        self._before = (at, busy_s)
        share = (busy_s - before_s) / (at - since) if at > since else 0.0
        return {WORK: load.wait_s, SHARE: min(1.0, share)}


def by_work(context: "AutoscalingContext") -> tuple[float, dict[str, Any]]:
    """(replicas, nothing to keep); without requests none, and Serve's least holds."""
    metrics: Any = context.aggregated_metrics or {}
    work_s, busy = (sum(metrics.get(name, {}).values()) for name in (WORK, SHARE))
    waiting = context.total_num_requests > 0
    return max(math.ceil(work_s / WAIT_S), math.ceil(busy / BUSY), int(waiting)), {}


def settings(least: int, most: int, calm_s: float) -> dict[str, Any]:
    """Serve's `autoscaling_config`; `calm_s`: as long must fewer be enough."""
    return {
        "min_replicas": least, "max_replicas": most, "upscale_delay_s": UP_S, "downscale_delay_s": calm_s,
        "look_back_period_s": LOOK_BACK_S, "metrics_interval_s": LOOK_BACK_S / 3,
        "policy": {"policy_function": f"{__name__}:{by_work.__name__}"},
    }  # fmt: skip
