"""The teacher as a Ray Data actor: micro-batches in, micro-batches with targets out. Built once for a whole run.

Importing this module is cheap: the processes that only plan the stream meet the class, the actors alone need torch.
"""

import math
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raydistil import turns
from raydistil.places import compared_places, evened, said_of_rows, sent_places
from raydistil.specs import TeacherSpec
from raydistil.steps import MICRO_BATCHES_PER_BLOCK
from raydistil.types import TeacherTiming, TokenBatch, models_language
from raydistil.wire import batch_of, with_targets

if TYPE_CHECKING:
    from torch import Tensor


GROUP_S = 0.05


def grouped(rows: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """What of `rows` comes within `GROUP_S` as one table.

    Each table costs the one process that schedules the stream a few milliseconds: a fast teacher's must be few. A slow
    one's leave it one by one, so that the student need not wait for a whole block.
    """
    made, since = list[pa.Table](), time.monotonic()
    for row in rows:
        made.append(row)
        if time.monotonic() - since >= GROUP_S:
            yield pa.concat_tables(made)
            made, since = [], time.monotonic()
    if made:
        yield pa.concat_tables(made)


LANES = MICRO_BATCHES_PER_BLOCK  # most of them at once


class Teacher:
    """One loaded teacher. Rows of the tables are micro-batches (see `wire`).

    On a CPU it works on several micro-batches at once, each with few threads: they need not wait for each other, as the
    threads of one product do.
    """

    def __init__(self, spec: TeacherSpec, progress: Any = None) -> None:
        """`progress`: the actor that is told of it, if any; raises what that answers."""
        _allowed(progress)
        import torch

        from raydistil.models import HeadedEncoder, load_model

        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = HeadedEncoder(load_model(spec.model, spec.task), spec.task, spec.precision)
        self._model = model.frozen().to(self._device)
        head = spec.targets.soft_labels and models_language(spec.task)
        self._states = tuple({*spec.targets.states, *((self._model.num_layers,) if head else ())})
        self._spec = spec
        self.name = uuid4().hex
        lanes = num_lanes(spec.threads) if self._device.type == "cpu" else 1
        self._lanes = ThreadPoolExecutor(lanes, initializer=enter_lane, initargs=(spec.threads // lanes, spec.behind))

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        return grouped(self._lanes.map(self._taught, [table.slice(number, 1) for number in range(table.num_rows)]))

    def _taught(self, row: pa.Table) -> pa.Table:
        batch = batch_of(row)
        started = time.time()
        columns = self.targets(batch)
        lane = f"{self.name}.{threading.get_ident()}"
        return with_targets(row, columns, TeacherTiming(lane, started, time.time(), batch.num_tokens))

    def each(self, batches: Iterable[TokenBatch]) -> Iterator[dict[str, bytes]]:
        """The `targets` of several micro-batches, in their order."""
        return self._lanes.map(self.targets, batches)

    def targets(self, batch: TokenBatch) -> dict[str, bytes]:
        """The wire columns of one micro-batch, made in this thread."""
        import torch

        from raydistil.models import on_device
        from raydistil.targets import encode_targets

        wanted, device = self._spec.targets, self._device
        visits_N = np.repeat(batch.visits_B, said_of_rows(batch))
        with torch.inference_mode():
            states, logits = self._model(on_device(batch, device), self._states)
            parts: Iterable[Tensor] | None = None if logits is None else [logits]
            if wanted.compared:
                sent_T = torch.from_numpy(sent_places(batch, wanted.loss, wanted.seed)).to(device)
                states = {n: state_TD[sent_T] for n, state_TD in states.items()}
            if wanted.soft_labels and parts is None:
                at_N = np.flatnonzero(compared_places(batch, wanted.loss, wanted.seed).at_T)
                visits_N = np.repeat(batch.visits_B, batch.lengths_B)[at_N]
                parts = self._logits(states[self._model.num_layers], at_N)
            return encode_targets(wanted, visits_N, states, parts)

    def _logits(self, state_TD: "Tensor", at_N: NDArray[np.int64]) -> "Iterator[Tensor]":
        """[n, V] of PLACES_AT_ONCE of the places at a time; one part, without rows, where there is none."""
        import torch

        from raydistil.targets import PLACES_AT_ONCE

        state_MD = state_TD.index_select(0, torch.from_numpy(evened(at_N)).to(state_TD.device))
        for start in range(0, max(1, len(at_N)), PLACES_AT_ONCE):
            logits_mV = self._model.vocabulary_logits(state_MD[start : start + PLACES_AT_ONCE])
            yield logits_mV[: len(at_N) - start]


def _allowed(progress: Any) -> None:
    import ray

    if progress is not None:
        refused = ray.get(progress.build.remote(ray.get_runtime_context().get_actor_id()))
        if refused is not None:
            raise refused


def num_lanes(threads: int) -> int:
    """The most that share so many threads, and a block of the stream, without a rest."""
    return math.gcd(threads, LANES)


def enter_lane(threads: int, behind: bool) -> None:
    """Make this thread one of a teacher's. `behind`: the students, whose cores it shares."""
    import torch

    torch.set_num_threads(threads)
    turns.last() if behind else turns.in_front()
