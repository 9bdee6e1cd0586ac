"""What Prometheus reads at /metrics, of all replicas whichever is asked: each keeps its own and shows them on a board.

Every series is there from the first second, at zero.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.registry import Collector

from raydistil.serve.batcher import Batch, Load
from raydistil.serve.canary import Limits, Tried, verdict

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OUTCOMES = ("answered", "failed", "skipped")  # of what is beside the student
PHASES = ("tokenization", "queue", "inference", "total")
GONE = 499  # the client left before there was an answer; nginx's number
STATUSES = ("200", "400", "401", "404", "413", "422", "429", str(GONE), "500", "503", "504")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
Families = list[Metric]
GONE_S, KEPT_S = 10.0, 600.0  # since a replica last showed anything
disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, of when it was made


class Meter:
    """The counts of one replica."""

    def __init__(self, replica: str) -> None:
        self._registry = own = CollectorRegistry()
        self._replica = replica

        def made(kind: Any, name: str, text: str, *labels: str, **more: Any) -> Any:
            return kind(f"raydistil_{name}", text, ("replica", *labels), registry=own, **more)

        self._requests = made(Counter, "requests", "Requests of the model's route that were answered", "status")
        self._seconds = made(Histogram, "request_seconds", "Where requests' time went", "phase", buckets=SECONDS)
        self._batch = made(Histogram, "batch_tokens", "Tokens of a batch", buckets=TOKENS).labels(replica)
        self._items = made(Counter, "items", "Texts that were run").labels(replica)
        self._tokens = made(Counter, "tokens", "Tokens that were run").labels(replica)
        self._failures = made(Counter, "failures", "Texts at which the model failed").labels(replica)
        self._cut = made(Counter, "truncated", "Texts that were cut to what the model takes").labels(replica)
        self._busy = made(Counter, "busy_seconds", "Time that batches took").labels(replica)
        self._waiting = made(Gauge, "queue_tokens", "Tokens that wait").labels(replica)
        self._wait = made(Gauge, "queue_seconds", "How long who comes now would wait").labels(replica)
        self._asked = made(Counter, "beside", "Requests to what is beside the student", "model", "outcome")
        self._compared = made(Counter, "compared", "Texts that another model answered, too", "model")
        self._agreement = made(Counter, "agreement", "How far it agreed, 0 to 1 for each of them", "model")
        self._cascaded = made(Counter, "cascaded", "Texts of the cascade by who answered", "by")
        self._confidence = made(Counter, "confidence", "Calibrated confidence of the student, summed", "by")
        self._expected = made(Gauge, "cascade_accuracy", "Of the cascade on the validation rows")
        for status in STATUSES:
            self._requests.labels(replica, status)
        for phase in PHASES:
            self._seconds.labels(replica, phase)

    def request(self, status: int, seconds: float) -> None:
        self._requests.labels(self._replica, str(status)).inc()
        self._seconds.labels(self._replica, "total").observe(seconds)

    def phases(self, read_s: float, queued_s: float, ran_s: float) -> None:
        for phase, seconds in zip(PHASES, (read_s, queued_s, ran_s), strict=False):
            self._seconds.labels(self._replica, phase).observe(seconds)

    def batch(self, batch: Batch) -> None:
        self._batch.observe(batch.tokens)
        for count, value in (
            (self._items, batch.items), (self._tokens, batch.tokens), (self._failures, batch.failures),
            (self._busy, batch.seconds),
        ):  # fmt: skip
            count.inc(value)

    def cut(self, texts: int) -> None:
        self._cut.inc(texts)

    def beside(self, names: Iterable[str], cascade_accuracy: float | None) -> None:
        """Their series, at zero."""
        for name in names:
            for outcome in OUTCOMES:
                self._asked.labels(self._replica, name, outcome)
            self._compared.labels(self._replica, name)
            self._agreement.labels(self._replica, name)
        if cascade_accuracy is not None:
            self._expected.labels(self._replica).set(cascade_accuracy)
            for who in ("student", "teacher"):
                self._cascaded.labels(self._replica, who)
                self._confidence.labels(self._replica, who)

    def asked(self, name: str, outcome: str) -> None:
        self._asked.labels(self._replica, name, outcome).inc()

    def agreed(self, name: str, shares: list[float]) -> None:
        self._compared.labels(self._replica, name).inc(len(shares))
        self._agreement.labels(self._replica, name).inc(sum(shares))

    def cascaded(self, texts: list[tuple[float, bool]]) -> None:
        """(the student's confidence, whether the teacher answered) of each."""
        for sure, escalated in texts:
            who = "teacher" if escalated else "student"
            self._cascaded.labels(self._replica, who).inc()
            self._confidence.labels(self._replica, who).inc(sure)

    def families(self, load: Load) -> Families:
        """All counts as they are now."""
        self._waiting.set(load.tokens)
        self._wait.set(load.wait_s)
        return list(self._registry.collect())


def exposition(replicas: Iterable[Families]) -> bytes:
    """Prometheus' text of several replicas: each family once, with the series of all."""
    merged: dict[str, Metric] = {}
    for families in replicas:
        for family in families:
            own = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            own.samples += family.samples
    return generate_latest(_Made(list(merged.values())))


@dataclass(frozen=True)
class _Made(Collector):
    """Families as a registry, as prometheus_client writes them."""

    made: Families

    def collect(self) -> Families:
        return self.made


class Board:
    """Where replicas show what they have counted, every second or so. Of one that is gone nothing waits any more; its
    counts stay for a while, so that what was counted since Prometheus last looked is not lost.
    """

    def __init__(self) -> None:
        self._shown: dict[str, tuple[float, Families]] = {}
        self._tried: dict[str, dict[str, Tried]] = {}  # canary's version -> replica -> what that has seen
        self._verdicts: dict[str, str] = {}  # of the versions that have to go

    def show(self, replica: str, families: Families) -> list[Families]:
        """What all have shown, this one just now."""
        now = time.monotonic()
        self._shown[replica] = now, families
        self._shown = {name: shown for name, shown in self._shown.items() if now - shown[0] < KEPT_S}
        return [_counts(shown) if now - at > GONE_S else shown for at, shown in self._shown.values()]

    def tried(
        self, version: str, limits: Limits, replica: str, tried: Tried, stopped: str | None = None
    ) -> str | None:  # fmt: skip
        """Why the canary of that version has to go, by what all replicas have seen of it, this one so far; once said,
        it stays so, as `stopped` on a replica that was told by a board before this one."""
        seen = self._tried.setdefault(version, {})
        seen[replica] = tried
        found = stopped or verdict(sum(seen.values(), Tried()), limits)
        if found is not None:
            self._verdicts.setdefault(version, found)
        return self._verdicts.get(version)

    def verdict(self, version: str) -> str | None:
        """Why the canary of that version had to go."""
        return self._verdicts.get(version)


def _counts(families: Families) -> Families:
    return [family for family in families if family.type != "gauge"]
