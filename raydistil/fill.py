"""Filling the cache: teacher actors take rows from the token store and write shards of targets.

One Ray Data execution. Actors get numbers of shards and answer with counters; targets go from them to the files and
through nothing else. A run that was stopped left whole shards only, and goes on with those that are missing.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from raydistil.cache.check import describe_inputs, missing_shards, vouch
from raydistil.cache.columns import table_of
from raydistil.cache.files import write_shard
from raydistil.cache.layout import Shard, path_of
from raydistil.cache.sizes import Sizes
from raydistil.config.cluster import ClusterConfig
from raydistil.errors import StorageError, unwrapped
from raydistil.source import MicroBatches
from raydistil.specs import CacheSpec, SourceSpec, TeacherSpec
from raydistil.steps import MOST_BLOCKS
from raydistil.storage import free_bytes, mebibytes
from raydistil.stream import configure_data, on_teachers
from raydistil.teacher import Teacher

SAY_EVERY_S = 10.0
COUNTERS = pa.schema([("tokens", pa.int64()), ("teacher", pa.string())])


@dataclass(frozen=True, slots=True)
class FillSpec:
    """What is to be written, and by whom."""

    cache: CacheSpec
    source: SourceSpec
    teacher: TeacherSpec
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True)
class Filled:
    """A complete cache, and what it took."""

    path: str
    tokens: int  # of all variants
    num_bytes: int
    shards_written: int
    teacher_builds: int
    wall_s: float

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / max(1, self.tokens)


class Filler:
    """A teacher that writes what it says. Rows of the tables are numbers of shards."""

    def __init__(self, spec: FillSpec) -> None:
        self._spec = spec
        self._teacher = Teacher(spec.teacher)
        self._source = MicroBatches(spec.source)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for number in table["shard"].to_pylist():
            tokens = self._write(self._spec.shards[number])
            yield pa.table([[tokens], [self._teacher.name]], schema=COUNTERS)

    def _write(self, shard: Shard) -> int:
        """The file of one shard; returns its tokens."""
        cache, step = self._spec.cache, self._spec.source.manifest.size_of(shard.bucket)
        tables, tokens, classes = [], 0, 0
        parts = [np.arange(first, min(first + step, shard.end)) for first in range(shard.first, shard.end, step)]
        batches = [self._source.visit(shard.bucket, rows, shard.variant) for rows in parts]
        for rows, batch, columns in zip(parts, batches, self._teacher.each(batches), strict=True):
            table, classes = table_of(cache.targets, batch, rows, columns)
            tables.append(table)
            tokens += batch.num_tokens
        metadata = {"fingerprint": cache.fingerprint, "shard": shard.name, "classes": classes}
        group = cache.group_rows[shard.bucket]
        write_shard(path_of(cache, shard), pa.concat_tables(tables).combine_chunks(), group, metadata)
        return tokens


def fill_cache(
    cache: CacheSpec, inputs: dict[str, Any], source: SourceSpec, teacher: TeacherSpec, sizes: Sizes, tokens: int,
    cluster: ClusterConfig, say: Callable[[str], None],
) -> Filled:  # fmt: skip
    """Write whatever `cache` lacks. `inputs`: what it depends on; `tokens`: of one variant.

    Raises StorageError where the disk has not the room, before anything is written.
    """
    started = time.monotonic()
    said = describe_inputs(cache, inputs)
    if said is not None:
        say(said)
    missing = tuple(missing_shards(cache, say))
    builds = 0
    if missing:
        _check_room(cache, sizes, tokens, missing)
        spec = FillSpec(cache, replace(source, caches=()), teacher, missing)
        builds = len(_run(spec, cluster, say))
    num_bytes, all_tokens = vouch(cache), tokens * cache.variants
    filled = Filled(str(cache.path), all_tokens, num_bytes, len(missing), builds, time.monotonic() - started)
    say(_describe(filled))
    return filled


def _check_room(cache: CacheSpec, sizes: Sizes, tokens: int, missing: tuple[Shard, ...]) -> None:
    rows = sum(shard.num_rows for shard in missing)
    share = rows / max(1, sum(cache.bucket_rows))
    wanted, free = sizes.of(share * tokens, rows), free_bytes(cache.path)
    if wanted > free:
        raise StorageError(
            f"expected room for {mebibytes(wanted)} of targets ({share * tokens:,.0f} tokens x {sizes.per_token:.4g} "
            f"bytes + {rows:,} rows x {sizes.per_row:.4g}, {cache.variants} variants), found {mebibytes(free)} free at "
            f"{cache.path}: free some, choose another distill.targets.cache, or a smaller codec"
        )


def _run(spec: FillSpec, cluster: ClusterConfig, say: Callable[[str], None]) -> set[str]:
    """Every shard of `spec`; returns the names of the teachers that were built."""
    teachers: set[str] = set()
    done, tokens, started = 0, 0, time.monotonic()
    shown = started
    written: Any = ray.remote(num_cpus=0)(_written)
    try:
        for counters in written.remote(spec, cluster):
            row = ray.get(counters)
            done, tokens = done + 1, tokens + row["tokens"]
            teachers.add(row["teacher"])
            if time.monotonic() - shown > SAY_EVERY_S:
                shown = time.monotonic()
                say(_progress(done, len(spec.shards), tokens, shown - started))
    except Exception as error:
        raise unwrapped(error) from error
    return teachers


def _written(spec: FillSpec, cluster: ClusterConfig) -> Iterator[dict[str, Any]]:
    """Runs as a Ray task, which schedules the execution: counters of every shard, as it is there."""
    configure_data()
    numbers = [{"shard": number} for number in range(len(spec.shards))]
    shards = ray.data.from_items(numbers, override_num_blocks=min(MOST_BLOCKS, len(numbers)))
    yield from on_teachers(shards, Filler, (spec,), cluster, at_once=1).iter_rows()


def _progress(done: int, total: int, tokens: int, elapsed_s: float) -> str:
    left = int(elapsed_s / done * (total - done))
    rate = tokens / elapsed_s / 1000
    return f"targets: {done}/{total} files | teacher {rate:.1f}k tok/s | ETA {left // 60}:{left % 60:02d}"


def _describe(filled: Filled) -> str:
    size = f"{mebibytes(filled.num_bytes)}, {filled.bytes_per_token:.4g} bytes a token"
    if not filled.shards_written:
        return f"targets: all kept in {filled.path} before ({size}); no teacher runs"
    return (
        f"targets: {filled.shards_written} files written in {filled.wall_s:.0f} s, teacher built "
        f"{filled.teacher_builds}x; now kept in {filled.path} ({filled.tokens:,} tokens, {size})"
    )
