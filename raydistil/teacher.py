"""The teacher as a Ray Data actor: micro-batches in, micro-batches with targets out. Built once for a whole run."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import uuid4

import pyarrow as pa
import torch

from raydistil.codecs import hidden
from raydistil.models import HeadedEncoder, load_model, on_device
from raydistil.types import Precision, Task, TeacherTiming, TokenBatch
from raydistil.wire import batch_of, with_targets


@dataclass(frozen=True, slots=True)
class TeacherSpec:
    """What a teacher actor is made of."""

    model: str
    task: Task
    precision: Precision
    threads: int


class Teacher:
    """One loaded teacher. Rows of the tables are micro-batches (see `wire`)."""

    def __init__(self, spec: TeacherSpec) -> None:
        torch.set_num_threads(spec.threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = HeadedEncoder(load_model(spec.model, spec.task), spec.task, spec.precision)
        self._model = model.eval().to(self._device)
        self._name = uuid4().hex

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """One table a micro-batch, so that the student need not wait for a whole block."""
        for number in range(table.num_rows):
            row = table.slice(number, 1)
            batch = batch_of(row)
            started = time.time()
            columns = self.targets(batch)
            timing = TeacherTiming(self._name, started, time.time(), batch.num_tokens)
            yield with_targets(row, columns, timing)

    @torch.inference_mode()
    def targets(self, batch: TokenBatch) -> hidden.Wire:
        """The wire columns of one micro-batch."""
        ids_BL, mask_BL = on_device(batch, self._device)
        hidden_TD, logits_BC = self._model(ids_BL, mask_BL, None)
        return hidden.encode(hidden_TD, logits_BC)
