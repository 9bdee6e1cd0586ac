"""The teacher as a Ray Data actor: micro-batches in, micro-batches with targets out. Built once for a whole run.

Importing this module is cheap: the processes that only plan the stream meet the class, the actors alone need torch.
"""

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np
import pyarrow as pa

from raydistil.places import compared_places
from raydistil.specs import TeacherSpec
from raydistil.types import TeacherTiming, TokenBatch, labels_texts
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


class Teacher:
    """One loaded teacher. Rows of the tables are micro-batches (see `wire`)."""

    def __init__(self, spec: TeacherSpec) -> None:
        import torch

        from raydistil.models import HeadedEncoder, load_model

        torch.set_num_threads(spec.threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = HeadedEncoder(load_model(spec.model, spec.task), spec.task, spec.precision)
        self._model = model.eval().to(self._device)
        head = spec.targets.soft_labels and not labels_texts(spec.task)
        self._states = tuple({*spec.targets.states, *((self._model.num_layers,) if head else ())})
        self._spec = spec
        self.name = uuid4().hex

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        return grouped(self._taught(table.slice(number, 1)) for number in range(table.num_rows))

    def _taught(self, row: pa.Table) -> pa.Table:
        batch = batch_of(row)
        started = time.time()
        columns = self.targets(batch)
        return with_targets(row, columns, TeacherTiming(self.name, started, time.time(), batch.num_tokens))

    def targets(self, batch: TokenBatch) -> dict[str, bytes]:
        """The wire columns of one micro-batch."""
        import torch

        from raydistil.models import on_device, positions_on
        from raydistil.targets import PLACES_AT_ONCE, encode_targets

        wanted, device, visits_N = self._spec.targets, self._device, batch.visits_B
        with torch.inference_mode():
            states, logits = self._model(*on_device(batch, device), self._states, positions_on(batch, device))
            parts: Iterable[Tensor] | None = None if logits is None else [logits]
            if wanted.soft_labels and parts is None:
                at_T = compared_places(batch, wanted.loss, wanted.seed).at_T
                visits_N = np.repeat(visits_N, batch.lengths_B)[at_T]
                compared_ND = states[self._model.num_layers][torch.from_numpy(at_T).to(device)]
                parts = map(self._model.vocabulary_logits, compared_ND.split(PLACES_AT_ONCE))
            return encode_targets(wanted, visits_N, states, parts)
