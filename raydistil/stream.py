"""The stream: manifest -> tokens -> mask -> teacher actors (or the cache) -> shards of the student workers.

ONE Ray Data execution covers the whole run, so the teacher is built once. The source makes micro-batches from nothing
but (seed, index); the teacher adds its targets; Ray Train splits the rows over the student workers. Only references
and counters pass through the driver. How much may wait in the object store is bounded here and nowhere else.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import ray.data
import ray.train
from ray.data import ActorPoolStrategy, DataContext, Dataset, ExecutionOptions, ExecutionResources

from raydistil.config.cluster import ClusterConfig
from raydistil.pace import Paced
from raydistil.plan import READ_CPUS
from raydistil.source import ManifestSource
from raydistil.specs import SourceSpec, TeacherSpec
from raydistil.steps import MICRO_BATCHES_PER_BLOCK, Steps
from raydistil.teacher import Teacher
from raydistil.warm import environment

BLOCK_BYTES = 64 << 10  # from here on a block is passed on, and a larger one split: states leave the teacher at once
ONE_ROW = 1  # as BLOCK_BYTES: Ray Data deals blocks out in turn, so that with one row each every worker gets its own
PREFETCH = 2  # micro-batches a student worker holds ready


def build_stream(
    spec: SourceSpec, steps: Steps, teachers: tuple[TeacherSpec, ...], cluster: ClusterConfig, progress: Any = None
) -> Dataset:
    """The data set of micro-batches with the targets of all teachers (see `wire`), in the order of `steps`.

    Each teacher has a pool of actors of its own, which tell `progress` that they are built. Where `spec` has caches the
    targets are taken from there, and no teacher is built.
    """
    source = build_source(spec, steps)
    for teacher in () if spec.caches else teachers:
        source = on_teachers(source, Teacher, (teacher, progress), cluster)
    return source


def build_source(spec: SourceSpec, steps: Steps) -> Dataset:
    """The micro-batches of `steps`, without targets but for those of a cache."""
    configure_data(ONE_ROW if steps.workers > 1 else BLOCK_BYTES)
    source: Dataset = ray.data.read_datasource(
        ManifestSource(spec, steps), num_cpus=READ_CPUS, override_num_blocks=len(steps.blocks()), concurrency=1,
        runtime_env=environment("reader"),
    )  # fmt: skip
    return source


def on_teachers(
    source: Dataset, actor: type, given: tuple[Any, ...], cluster: ClusterConfig, at_once: int = MICRO_BATCHES_PER_BLOCK
) -> Dataset:
    """What the teachers' actors, `actor(*given)`, make of `source`, so many rows in a call."""
    fewest, most = cluster.teachers
    taught: Dataset = source.map_batches(
        actor,
        fn_constructor_args=given,
        batch_size=at_once,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=fewest, max_size=most, max_tasks_in_flight_per_actor=3),
        num_cpus=cluster.teacher_cpus,
        num_gpus=cluster.teacher_gpus or None,
        label_selector=cluster.teacher_label_selector or None,
        udf_modifying_row_count=False,
        runtime_env={} if cluster.teacher_gpus else environment("teacher"),
    )
    return taught


def configure_data(block_bytes: int = BLOCK_BYTES) -> None:
    """Ray Data's settings, for every execution of a run."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # here, since its import sets a level of its own
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = block_bytes
    context.execution_no_progress_timeout_s = -1  # a student that evaluates or compiles for long is no failure
    context.enable_fallback_to_arrow_object_ext_type = False
    context.max_consecutive_actor_init_deaths = 3
    context.custom_execution_callback_classes = [Paced]


def execution_options(cluster: ClusterConfig) -> ExecutionOptions:
    """In manifest order, and never more than the bound in the object store."""
    limits = ExecutionResources(object_store_memory=cluster.max_bytes_in_flight)
    return ExecutionOptions(preserve_order=True, resource_limits=limits)


def shard_rows() -> Iterator[pa.Table]:
    """This student worker's share of the stream, one micro-batch at a time.

    The first one is asked for at once, in the background: the teacher loads while the student is made.
    """
    rows = _shard_rows()
    pool = ThreadPoolExecutor(1)
    first = pool.submit(next, rows, None)

    def primed() -> Iterator[pa.Table]:
        row = first.result()
        pool.shutdown()
        if row is not None:
            yield row
            yield from rows

    return primed()


def _shard_rows() -> Iterator[pa.Table]:
    shard = ray.train.get_dataset_shard("train")
    yield from shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=PREFETCH)
