"""The stream: manifest -> tokens -> mask -> teacher actors -> shards of the student workers.

ONE Ray Data execution covers the whole run, so the teacher is built once. The source makes micro-batches from nothing
but (seed, index); the teacher adds its targets; Ray Train splits the rows over the student workers. Only references
and counters pass through the driver. How much may wait in the object store is bounded here and nowhere else.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset, ExecutionOptions, ExecutionResources
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from raydistil import wire
from raydistil.config import ClusterConfig, MaskingConfig
from raydistil.manifest import Ledger, Manifest, Slot
from raydistil.masking import Vocabulary, mask_tokens
from raydistil.plan import READ_CPUS
from raydistil.teacher import Teacher, TeacherSpec
from raydistil.tokens import TokenStore
from raydistil.types import Split, TokenBatch

MICRO_BATCHES_PER_BLOCK = 4
MOST_BLOCKS = 20_000  # read tasks are made up front, so a long run gets longer blocks


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """Everything the content of the micro-batches depends on."""

    store: Path
    split: Split
    manifest: Manifest
    masking: MaskingConfig | None  # None: labelled examples


class MicroBatches:
    """Micro-batches by index, out of the token store; a pure function of the spec and the index."""

    def __init__(self, spec: SourceSpec) -> None:
        self._spec = spec
        self._store = TokenStore(spec.store)
        meta = self._store.meta
        counts = self._store.token_counts() if spec.masking and spec.masking.kind == "frequency" else None
        self._vocabulary = Vocabulary(meta.vocab_size, meta.mask_id, meta.special_ids, counts)

    def make(self, index: int) -> TokenBatch:
        """Micro-batch `index`; past the end of the manifest one that holds a single row of no weight."""
        slot = self._spec.manifest.slot(index)
        if not len(slot.rows):
            return self._empty(slot)
        ids, lengths, labels = self._store.read(self._spec.split, slot.bucket, slot.rows)
        if self._spec.masking is None:
            return TokenBatch(index, ids, lengths, labels, None, len(slot.rows))
        masked, token_labels = mask_tokens(
            ids, lengths, self._spec.masking, self._vocabulary, self._spec.manifest.seed, index, slot.positions
        )
        return TokenBatch(index, masked, lengths, None, token_labels, len(slot.rows))

    def _empty(self, slot: Slot) -> TokenBatch:
        ids, lengths, labels = self._store.read(self._spec.split, slot.bucket, np.zeros(1, np.int64))
        token_labels = None if self._spec.masking is None else np.full_like(ids, -100)
        return TokenBatch(slot.index, ids, lengths, None if self._spec.masking else labels, token_labels, 0)


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
        return [self._task(int(first), int(end)) for first, end in zip(edges[:-1], edges[1:], strict=True)]

    def _task(self, first: int, end: int) -> ReadTask:
        indices = self._ledger.select(np.arange(first, end), self._total)
        metadata = BlockMetadata(num_rows=end - first, size_bytes=None, input_files=None, exec_stats=None)
        return ReadTask(partial(_read, self._spec, indices.tolist()), metadata, schema=wire.BATCH)


def _read(spec: SourceSpec, indices: list[int]) -> Iterable[pa.Table]:
    source = MicroBatches(spec)
    yield wire.table_of([source.make(index) for index in indices])


def build_stream(
    spec: SourceSpec, total: int, ledger: Ledger, teacher: TeacherSpec | None, cluster: ClusterConfig
) -> Dataset:
    """The data set of micro-batches (columns wire.TARGETS, or wire.BATCH without a teacher), in manifest order."""
    _configure(DataContext.get_current())
    missing = ledger.missing(total)
    blocks = max(1, min(MOST_BLOCKS, missing // MICRO_BATCHES_PER_BLOCK))
    source = ray.data.read_datasource(
        ManifestSource(spec, total, ledger), num_cpus=READ_CPUS, override_num_blocks=blocks, concurrency=1
    )
    if teacher is None:
        return source
    fewest, most = cluster.teachers
    return source.map_batches(
        Teacher,
        fn_constructor_args=(teacher,),
        batch_size=1 if cluster.teacher_gpus else None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=fewest, max_size=most, max_tasks_in_flight_per_actor=3),
        num_cpus=cluster.teacher_cpus,
        num_gpus=cluster.teacher_gpus or None,
        udf_modifying_row_count=False,
    )


def _configure(context: DataContext) -> None:
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 8 << 20
    context.execution_no_progress_timeout_s = -1  # a student that evaluates or compiles for long is no failure
    context.enable_fallback_to_arrow_object_ext_type = False
    context.max_consecutive_actor_init_deaths = 3


def execution_options(cluster: ClusterConfig) -> ExecutionOptions:
    """In manifest order, and never more than the bound in the object store."""
    limits = ExecutionResources(object_store_memory=cluster.max_bytes_in_flight)
    return ExecutionOptions(preserve_order=True, resource_limits=limits)
