"""The source of the stream: micro-batches made from nothing but (seed, index) and the token store."""

from collections.abc import Iterable
from functools import partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from raydistil import wire
from raydistil.augment import Words, augment
from raydistil.documents import next_tokens, positions_of
from raydistil.manifest import Ints, Ledger, Slot
from raydistil.masking import Vocabulary, mask_tokens
from raydistil.specs import SourceSpec
from raydistil.tokens import TokenStore
from raydistil.types import IGNORE, TokenBatch


class MicroBatches:
    """Micro-batches by index, out of the token store; a pure function of the spec and the index."""

    def __init__(self, spec: SourceSpec) -> None:
        self._spec = spec
        self._store = TokenStore(spec.store)
        meta = self._store.meta
        counted = spec.augment is not None or (spec.masking is not None and spec.masking.kind == "frequency")
        counts = self._store.token_counts() if counted else None
        self._vocabulary = Vocabulary(meta.vocab_size, meta.mask_id, meta.special_ids, counts)
        self._words = None if counts is None else Words(meta.pad_id, meta.mask_id, counts, meta.special_ids)

    def make(self, index: int) -> TokenBatch:
        """Micro-batch `index`; past the end of the manifest one that holds a single row of no weight."""
        slot = self._spec.manifest.slot(index)
        if not len(slot.rows):
            return self._empty(slot)
        ids, lengths, labels = self._store.read(self._spec.split, slot.bucket, slot.rows)
        if self._store.meta.documents:
            positions = self._positions(slot.bucket, slot.rows)
            return TokenBatch(index, ids, lengths, None, next_tokens(ids, positions), len(slot.rows), positions)
        if self._spec.masking is None:
            return self._varied(TokenBatch(index, ids, lengths, labels, None, len(slot.rows)))
        masked, token_labels = mask_tokens(
            ids, lengths, self._spec.masking, self._vocabulary, self._spec.manifest.seed, index, slot.positions
        )
        return TokenBatch(index, masked, lengths, None, token_labels, len(slot.rows))

    def _varied(self, batch: TokenBatch) -> TokenBatch:
        if self._spec.augment is None:
            return batch
        assert self._words is not None
        return augment(batch, self._spec.augment, self._words, self._spec.manifest.seed)

    def _positions(self, bucket: int, rows: Ints) -> NDArray[np.int32]:
        return positions_of(self._store.starts(self._spec.split, bucket, rows))

    def _empty(self, slot: Slot) -> TokenBatch:
        first = np.zeros(1, np.int64)
        ids, lengths, labels = self._store.read(self._spec.split, slot.bucket, first)
        positions = self._positions(slot.bucket, first) if self._store.meta.documents else None
        if self._spec.masking is None and positions is None:
            return TokenBatch(slot.index, ids, lengths, labels, None, 0)
        return TokenBatch(slot.index, ids, lengths, None, np.full_like(ids, IGNORE), 0, positions)


class ManifestSource(Datasource):
    """The micro-batches of `spec` that `ledger` does not hold, ascending, as a Ray Data source."""

    def __init__(self, spec: SourceSpec, total: int, ledger: Ledger) -> None:
        self._spec = spec
        self._total = total
        self._ledger = ledger

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        missing = self._ledger.missing(self._total)
        edges = np.linspace(0, missing, min(parallelism, missing) + 1, dtype=np.int64)
        return [self._task(int(first), int(end)) for first, end in pairwise(edges)]

    def _task(self, first: int, end: int) -> ReadTask:
        indices = self._ledger.select(np.arange(first, end), self._total)
        metadata = BlockMetadata(num_rows=end - first, size_bytes=None, input_files=None, exec_stats=None)
        return ReadTask(partial(_read, self._spec, indices.tolist()), metadata, schema=wire.BATCH)


def _read(spec: SourceSpec, indices: list[int]) -> Iterable[pa.Table]:
    source = MicroBatches(spec)
    yield wire.table_of([source.make(index) for index in indices])
