"""The one small actor between the student workers, Ray Train's controller and the driver.

Figures and news go to the driver, wishes to the workers; and it keeps count of the starts, which nobody else outlives.
"""

from collections import Counter
from enum import IntEnum
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray

from raydistil.errors import FailedError, RaydistilError
from raydistil.raylet import LOG
from raydistil.types import TrainSummary


class Wish(IntEnum):
    """What the driver wants of the workers, the more urgent the higher."""

    NONE = 0
    SAVE = 1  # a checkpoint, and on
    STOP = 2  # a checkpoint, and an end


@ray.remote(num_cpus=0)
class Progress:
    """Of one training, from the driver's start to its end."""

    def __init__(self, max_failures: int, log: Path) -> None:
        """`log`: a file for what workers could say of their deaths."""
        self._metrics: list[dict[str, Any]] = []
        self._news: list[str] = []
        self._wish = Wish.NONE
        self._max_failures, self._log = max_failures, log
        self._ray_says = f"Ray may say more in {log.with_name(LOG)}"
        self._step, self._again, self._starts = -1, 0, 0
        self._from: str | None = None
        self._name = ""
        self._said: str | None = None  # by a worker of this start that failed
        self._resized = False  # this start was stopped, to start as many as there is room for
        self._refused: RaydistilError | None = None
        self._summary: TrainSummary | None = None
        self._built: Counter[str] = Counter()  # how often which teacher was, since the last step

    # ---- of the controller

    def start(self, step: int, checkpoint: str | None) -> "RaydistilError | None":
        """Workers are about to start from `step`; answers why they should not."""
        self._again = self._again + 1 if step == self._step else 1
        self._step, self._from, self._name, self._starts = step, checkpoint, uuid4().hex[:8], self._starts + 1
        said, self._said = self._said or f"killed, perhaps for their memory; {self._ray_says}", None
        died, self._resized = not self._resized, False
        if self._again > self._max_failures + 1:
            self.refuse(FailedError(
                f"expected a checkpoint within {self._max_failures + 1} starts from step {step}, but the workers died "
                f"each time ({said}): see cluster.max_failures"
            ))  # fmt: skip
        elif self._starts > 1 and self._refused is None:
            self.tell((f"the workers died ({said}): " if died else "") + f"they start again from step {step}")
        return self._refused

    def resize(self) -> None:
        """The workers are about to be stopped, for as many as there is room for to start."""
        self._resized = True

    # ---- of the teachers

    def build(self, teacher: str) -> "RaydistilError | None":
        """A teacher is about to be built, perhaps once more; answers why it should not."""
        self._built[teacher] += 1
        if self._built[teacher] > self._max_failures + 1:
            self.refuse(FailedError(
                f"expected a teacher that lives through its work, but one died {self._max_failures + 1} times without "
                f"a step of the student between (killed, perhaps for its memory; {self._ray_says}): give its node "
                f"more, or lower micro_batch_size or cluster.teachers; see cluster.max_failures"
            ))  # fmt: skip
        return self._refused

    # ---- of the workers

    def started(self) -> tuple[str | None, str]:
        """(the checkpoint they go on from, a name of this start alone)."""
        return self._from, self._name

    def failed(self, text: str) -> None:
        """A worker could say why it died: a traceback. The first one to say so is the cause, the others lost it."""
        with self._log.open("a", encoding="utf8") as file:
            file.write(text)
        self._said = self._said or f"{text.strip().splitlines()[-1]}; the whole of it is in {self._log}"

    def refuse(self, error: "RaydistilError") -> None:
        """Nothing would mend this: workers that start again should not; the first such error counts."""
        self._refused = self._refused or error

    def push(self, metrics: dict[str, Any]) -> int:
        """Keep `metrics` for the driver; answers its wish, which is fulfilled with that unless it is to stop."""
        self._metrics.append(metrics)
        self._built.clear()
        wish, self._wish = self._wish, self._wish if self._wish == Wish.STOP else Wish.NONE
        return wish

    def tell(self, news: str) -> None:
        """A line for the user."""
        self._news.append(news)

    def finish(self, summary: TrainSummary) -> None:
        """The last checkpoint of the training, or of its part until it was stopped, is there."""
        self._summary = summary

    # ---- of the driver

    def drain(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The metrics and the news since the last time."""
        metrics, self._metrics = self._metrics, []
        news, self._news = self._news, []
        return metrics, news

    def wish(self, wish: int) -> None:
        self._wish = max(self._wish, Wish(wish))

    def outcome(self) -> "tuple[TrainSummary | None, RaydistilError | None, int]":
        """(how it ended well, what nothing would mend, starts of the workers)."""
        return self._summary, self._refused, self._starts
