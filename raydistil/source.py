"""The source of the stream: micro-batches made from nothing but (seed, index) and the token store."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from raydistil import wire
from raydistil.augment import Words, augment
from raydistil.cache.read import CachedTargets
from raydistil.documents import next_tokens, positions_of
from raydistil.manifest import Ints, Slot
from raydistil.masking import Vocabulary, mask_tokens, row_keys, uniforms
from raydistil.specs import SourceSpec
from raydistil.steps import Steps
from raydistil.tokens import TokenStore
from raydistil.types import TokenBatch

_PARTNER = 7  # a stream of random numbers apart from those of masking, sampling, drawing and augmenting
FIRST_ROW = np.zeros(1, np.int64)


class MicroBatches:
    """Micro-batches by index, out of the token store; a pure function of the spec and the index."""

    def __init__(self, spec: SourceSpec) -> None:
        self._spec = spec
        self._store = TokenStore(spec.store)
        self._cached = [CachedTargets(cache) for cache in spec.caches]
        meta = self._store.meta
        counted = spec.augment is not None or (spec.masking is not None and spec.masking.kind == "frequency")
        counts = self._store.token_counts() if counted else None
        self._vocabulary = Vocabulary(meta.vocab_size, meta.mask_id, meta.special_ids, counts)
        joint = meta.joint or ()
        self._words = None if counts is None else Words(meta.pad_id, meta.mask_id, counts, meta.special_ids, joint)

    def taught(self, index: int) -> pa.Table:
        """Micro-batch `index` with every teacher's targets out of the caches, a row of `wire`."""
        slot, batch = self._spec.manifest.slot(index), self.make(index)
        rows = slot.rows if len(slot.rows) else FIRST_ROW
        table = wire.table_of([batch])
        for cached in self._cached:
            columns = cached.columns(batch, slot.bucket, self._variant(slot), rows)
            table = wire.with_targets(table, columns, None)
        return table

    def make(self, index: int) -> TokenBatch:
        """Micro-batch `index`; outside of the manifest one that holds a single row of no weight."""
        slot = self._spec.manifest.slot(index)
        if not len(slot.rows):
            return self._empty(slot)
        if self._spec.variants is not None:
            return self.visit(slot.bucket, slot.rows, self._variant(slot), index)
        return self._batch(index, slot.bucket, slot.rows, slot.positions)

    def visit(self, bucket: int, rows: Ints, variant: int, index: int = 0) -> TokenBatch:
        """`rows` of a bucket with their draws number `variant`: each row a function of (seed, row, variant) alone."""
        sizes = self._spec.manifest.bucket_rows
        return self._batch(index, bucket, rows, variant * sum(sizes) + sum(sizes[:bucket]) + rows)

    def _variant(self, slot: Slot) -> int:
        return slot.epoch % (self._spec.variants or 1) if len(slot.rows) else 0

    def _batch(self, index: int, bucket: int, rows: Ints, visits: Ints) -> TokenBatch:
        ids, lengths, labels = self._store.read(self._spec.split, bucket, rows)
        content, extra = self._store.meta.content, partial(self._store.extra, self._spec.split, bucket, rows)
        if content == "documents":
            places = positions_of(extra("starts"))
            return TokenBatch(index, ids, lengths, None, next_tokens(ids, places), len(rows), visits, places)
        if content == "tags":
            return TokenBatch(index, ids, lengths, None, None, len(rows), visits, tags_BL=extra("tags"))
        if content == "answers":
            return TokenBatch(
                index, ids, lengths, None, None, len(rows), visits, spans_B2=extra("span"),
                contexts_B=extra("context")[:, 0],
            )  # fmt: skip
        if self._spec.masking is None:
            contexts = self._contexts(bucket, rows)
            batch = TokenBatch(index, ids, lengths, labels, None, len(rows), visits, contexts_B=contexts)
            return self._varied(batch, bucket)
        masked, token_labels = mask_tokens(
            ids, lengths, self._spec.masking, self._vocabulary, self._spec.manifest.seed,
            index if self._spec.variants is None else None, visits,
        )  # fmt: skip
        return TokenBatch(index, masked, lengths, None, token_labels, len(rows), visits)

    def _varied(self, batch: TokenBatch, bucket: int) -> TokenBatch:
        """As `augment` has it, each row with another one of its bucket as a partner."""
        if self._spec.augment is None:
            return batch
        assert self._words is not None
        seed = self._spec.manifest.seed
        partners_B1 = uniforms(row_keys(seed, batch.visits_B), 1, _PARTNER) * self._spec.manifest.bucket_rows[bucket]
        rows = partners_B1[:, 0].astype(np.int64)
        ids, lengths, _ = self._store.read(self._spec.split, bucket, rows)
        partner = replace(batch, input_ids_BL=ids, lengths_B=lengths, contexts_B=self._contexts(bucket, rows))
        return augment(batch, partner, self._spec.augment, self._words, seed)

    def _contexts(self, bucket: int, rows: Ints) -> NDArray[np.int32] | None:
        """Where the second texts of pairs begin."""
        if not self._store.meta.pairs:
            return None
        starts: NDArray[np.int32] = self._store.extra(self._spec.split, bucket, rows, "context")[:, 0]
        return starts

    def _empty(self, slot: Slot) -> TokenBatch:
        """A row that a cache has targets of, without weight."""
        return replace(self.visit(slot.bucket, FIRST_ROW, 0, slot.index), num_rows=0)


class ManifestSource(Datasource):
    """The micro-batches of `steps`, as a Ray Data source: a task for each block."""

    def __init__(self, spec: SourceSpec, steps: Steps) -> None:
        self._spec = spec
        self._steps = steps

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        return [self._task(indices) for indices in self._steps.blocks()]

    def _task(self, indices: Ints) -> ReadTask:
        metadata = BlockMetadata(num_rows=len(indices), size_bytes=None, input_files=None, exec_stats=None)
        schema = wire.schema_of(len(self._spec.caches))
        return ReadTask(partial(_read, self._spec, indices.tolist()), metadata, schema=schema)


def _read(spec: SourceSpec, indices: list[int]) -> Iterable[pa.Table]:
    source = MicroBatches(spec)
    if not spec.caches:
        yield wire.table_of([source.make(index) for index in indices])
        return
    for index in indices:  # one table each: targets are large
        yield source.taught(index)
