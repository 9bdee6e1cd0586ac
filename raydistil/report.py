"""What a run says of itself: measured by the student's rank 0, carried by one small actor, shown by the driver.

Shown as one live line in a terminal and as plain lines elsewhere; the same goes to `metrics.jsonl`.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import ray
from grpc import RpcError
from ray._private.internal_api import get_memory_info_reply
from ray.actor import ActorHandle

from raydistil.tally import Tally, Used
from raydistil.trace import Record
from raydistil.types import StepMetrics, TrainSummary

if TYPE_CHECKING:
    from torch import Tensor

Interval = tuple[float, float]
PUSH_EVERY_S = 0.25
PLAIN_EVERY_S = 10.0
ANSWERS_S = 10.0
KEPT = 128  # intervals that are looked at again


def overlap(first: list[Interval], second: list[Interval]) -> float:
    """Seconds that lie in an interval of both lists; the intervals of one list may overlap each other."""
    total, i, j = 0.0, 0, 0
    left, right = _union(first), _union(second)
    while i < len(left) and j < len(right):
        total += max(0.0, min(left[i][1], right[j][1]) - max(left[i][0], right[j][0]))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return total


def _union(intervals: list[Interval]) -> list[Interval]:
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


class Overlap:
    """Adds up `overlap` of two streams of intervals while they come, in bounded memory.

    Intervals may come late by up to KEPT places.
    """

    def __init__(self) -> None:
        self._settled = 0.0
        self._first: list[Interval] = []
        self._second: list[Interval] = []

    def add(self, first: Interval, second: Interval) -> None:
        self._first.append(first)
        self._second.append(second)
        if len(self._first) > 2 * KEPT:
            recent = self._first[-KEPT:] + self._second[-KEPT:]
            self._settle(min(start for start, _ in recent))

    def total(self) -> float:
        return self._settled + overlap(self._first, self._second)

    def _settle(self, cut: float) -> None:
        """Count what lies before `cut`, keep what lies after."""
        self._settled += overlap(_before(self._first, cut), _before(self._second, cut))
        self._first, self._second = _after(self._first, cut), _after(self._second, cut)


def _before(intervals: list[Interval], cut: float) -> list[Interval]:
    return [(start, min(end, cut)) for start, end in intervals if start < cut]


def _after(intervals: list[Interval], cut: float) -> list[Interval]:
    return [(max(start, cut), end) for start, end in intervals if end > cut]


class Meter:
    """Where the time of one student worker goes. Rank 0's is pushed to the progress actor."""

    def __init__(
        self, rank: int, workers: int, progress: "ActorHandle[Any]", num_steps: int, first_step: int, shared: bool,
        used: Used,
    ) -> None:  # fmt: skip
        self._rank, self._workers = rank, workers
        self._progress = progress
        self._num_steps = num_steps
        self._first_step = first_step
        self._shared = shared  # cores, see `Tally.verdict`
        self._used = used
        self._began = self._pushed = time.time()
        self._first_row: float | None = None  # when work began: before it, the teacher was loading
        self._overlap = Overlap()
        self._all, self._recent = Tally(workers), Tally(workers)
        self._losses: dict[str, float] = {}
        self._step = first_step
        self._reply: Any = None
        self._wish = 0

    def micro_step(self, record: Record) -> None:
        """One micro-batch: asked for, there, trained on."""
        self._first_row = self._first_row or record.started_s
        self._all.add(record)
        self._recent.add(record)
        for timing in record.taught:
            self._overlap.add((record.started_s, record.ended_s), (timing.started_s, timing.ended_s))

    def step(self, step: int, epoch: float, losses: "dict[str, Tensor]", lr: float) -> None:
        """One optimizer step is done."""
        self._step = step
        if self._rank == 0:
            self._used.measure()  # here and not before: now the teacher has loaded
        self._hear()
        now = time.time()
        due = self._reply is None and now - self._pushed >= PUSH_EVERY_S
        if self._rank != 0 or not (due or step == self._num_steps):
            return
        self._losses = {name: value.item() for name, value in losses.items()}
        elapsed, recent = max(now - self._pushed, 1e-9), self._recent
        metrics = StepMetrics(
            step=step, num_steps=self._num_steps, epoch=epoch, losses=self._losses, lr=lr,
            student_tok_s=recent.tokens / elapsed, teacher_tok_s=self._all.teacher_tok_s,
            wait_share=recent.wait_s / elapsed,
            eta_s=(now - (self._first_row or now)) / max(1, step - self._first_step) * (self._num_steps - step),
            queue_depth=recent.queue_depth(elapsed), bytes_per_token=recent.num_bytes / max(1, recent.tokens),
            verdict=self._all.verdict(now - (self._first_row or now), self._shared),
            mfu=self._used.share(recent.tokens, elapsed),
        )  # fmt: skip
        self._pushed, self._recent = now, Tally(self._workers)
        self._reply = self._progress.push.remote(asdict(metrics))

    def wish(self) -> int:
        """The driver's, as far as its answers to what was pushed are there; each is told once."""
        self._hear()
        wish, self._wish = self._wish, 0
        return wish

    def _hear(self) -> None:
        if self._reply is not None and ray.wait([self._reply], timeout=0)[0]:
            self._wish = max(self._wish, ray.get(self._reply))
            self._reply = None

    @property
    def wall_s(self) -> float:
        """Since the worker's start."""
        return time.time() - self._began

    def summary(self, interrupted: bool, skipped_steps: int) -> TrainSummary:
        done, now = self._all, time.time()
        since = now - (self._first_row or now)
        return TrainSummary(
            steps=self._step, micro_batches=done.micro_batches, tokens=done.tokens,
            wall_s=self.wall_s, wait_s=done.wait_s,
            student_busy_s=done.student_busy_s, teacher_busy_s=done.teacher_busy_s,
            overlap_s=self._overlap.total(), teacher_builds=len(done.teachers),
            wire_bytes=done.num_bytes, final_losses=self._losses, interrupted=interrupted,
            verdict=done.verdict(since, self._shared), mfu=self._used.share(done.tokens, since),
            skipped_steps=skipped_steps,
        )  # fmt: skip


class Store:
    """The object stores of the cluster, all together, as Ray's own accounts have them."""

    def __init__(self) -> None:
        self.peak = 0  # most bytes in use whenever somebody looked
        self._spilled = _spilled()

    def spilled(self) -> int | None:
        """Bytes that went from them to a disk since this was made, not counting nodes that left; None: not known."""
        before, now = self._spilled, _spilled()
        return None if before is None or now is None else max(0, now - before)

    def look(self) -> int:
        """Bytes in use now."""
        name = "object_store_memory"
        used = int(ray.cluster_resources().get(name, 0) - ray.available_resources().get(name, 0))
        self.peak = max(self.peak, used)
        return used


def _spilled() -> int | None:
    """By all nodes since they started; None where the one that Ray asks for all of them has just gone."""
    try:
        return int(
            get_memory_info_reply(ray._private.state.state, timeout_seconds=ANSWERS_S).store_stats.spilled_bytes_total
        )
    except RpcError:
        return None


class LiveLine:
    """One line that is rewritten in a terminal; a plain line now and then elsewhere."""

    def __init__(self, stage: str, metrics_file: Path, out: TextIO | None = None) -> None:
        self._stage = stage
        self._out = sys.stderr if out is None else out
        self._terminal = self._out.isatty()
        self._file = metrics_file
        self._shown = 0.0
        self._open = False

    def show(self, metrics: StepMetrics) -> None:
        """Write to the file, and to the terminal when it is time."""
        with self._file.open("a") as file:
            file.write(json.dumps({"stage": self._stage, "time": time.time(), **asdict(metrics)}) + "\n")
        last = metrics.step == metrics.num_steps
        if not self._terminal and not last and time.monotonic() - self._shown < PLAIN_EVERY_S:
            return
        self._shown = time.monotonic()
        line = f"{self._stage:<11} {format_step(metrics)}"
        self._out.write(f"\r\x1b[K{line}" if self._terminal else line + "\n")
        self._out.flush()
        self._open = self._terminal

    def tell(self, news: str) -> None:
        """A line of its own."""
        self.close()
        self._out.write(f"{self._stage}: {news}\n")
        self._out.flush()

    def close(self) -> None:
        """End the live line, so that what follows starts on its own."""
        if self._open:
            self._out.write("\n")
            self._out.flush()
            self._open = False


def format_step(metrics: StepMetrics) -> str:
    """`step 12/480 | loss 1.23 (kd 0.10 task 0.90) | student 3.1k tok/s | ... | ETA 1:20`."""
    terms = " ".join(f"{name} {value:.3f}" for name, value in metrics.losses.items() if name != "loss")
    parts = [f"step {metrics.step}/{metrics.num_steps}", f"loss {metrics.losses['loss']:.3f} ({terms})"]
    parts.append(f"student {_rate(metrics.student_tok_s)}")
    if metrics.teacher_tok_s:
        parts.append(f"teacher {_rate(metrics.teacher_tok_s)}")
    parts.append(f"wait {metrics.wait_share:.0%}")
    parts.append(f"MFU {metrics.mfu:.0%}")
    if metrics.verdict:
        parts.append(metrics.verdict)
    parts.append(f"ETA {int(metrics.eta_s) // 60}:{int(metrics.eta_s) % 60:02d}")
    return " | ".join(parts)


def _rate(tokens_s: float) -> str:
    return f"{tokens_s / 1000:.1f}k tok/s"
