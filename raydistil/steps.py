"""What every optimizer step is made of, and which worker trains on which part of it.

A step is the same number of micro-batches, in the order of the manifest, whatever the number of workers: a training is
the same one, step by step, on one worker or on eight, and when it is taken up again by fewer of them. Where they cannot
share a step's evenly, some are given one that counts for nothing.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from raydistil.manifest import Ints

MICRO_BATCHES_PER_BLOCK = 4
MOST_BLOCKS = 20_000  # each is a task that is made up front, so a long run gets longer blocks
FILLER = -1  # the index of a micro-batch that counts for nothing


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps `first` .. `last` - 1 of a training, dealt out to `workers` in turn, a micro-batch each."""

    per_step: int  # micro-batches of one optimizer step, on all workers together
    first: int
    last: int
    workers: int = 1

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step on each worker."""
        return -(-self.per_step // self.workers)

    @property
    def weight(self) -> float:
        """Of each micro-batch, so that those that count for nothing take nothing from a step's mean: 1 without any."""
        return self.accumulation * self.workers / self.per_step

    @property
    def num_rows(self) -> int:
        """Micro-batches of the stream."""
        return (self.last - self.first) * self.accumulation * self.workers

    def blocks(self) -> list[Ints]:
        """The indices of the micro-batches of the stream, cut into the parts that are made at once."""
        count = max(1, min(MOST_BLOCKS, self.num_rows // MICRO_BATCHES_PER_BLOCK))
        edges = np.linspace(0, self.num_rows, count + 1, dtype=np.int64)
        return [self.indices(np.arange(start, end)) for start, end in pairwise(edges)]

    def indices(self, places: Ints) -> Ints:
        """Places in the manifest, or FILLER, of the micro-batches at these places of the stream."""
        step, place = np.divmod(places, self.accumulation * self.workers)
        return np.where(place < self.per_step, (self.first + step) * self.per_step + place, FILLER)

    def given(self, worker: int, turns: Ints) -> Ints:
        """The same of what `worker` is given at its turns, counted from 0."""
        return self.indices(turns * self.workers + worker)
