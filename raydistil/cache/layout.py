"""Which file of a cache holds which targets.

    CACHE/FINGERPRINT/cache.json                                  what the targets depend on
    CACHE/FINGERPRINT/verified.json                               files that were found whole, by size and time
    CACHE/FINGERPRINT/bucket-0/variant-000/rows-000000000.parquet a shard: so many rows of a bucket from there on

Variants are those of the masks; without masks there is one. Nothing here hangs on how many variants or epochs there
are: a run that wants more of them finds the first ones there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from raydistil.specs import CacheSpec


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows `first` to `end` of a bucket, with their draws number `variant`: one file, whole or not there."""

    bucket: int
    variant: int
    first: int
    end: int

    @property
    def num_rows(self) -> int:
        return self.end - self.first

    @property
    def name(self) -> str:
        return f"bucket-{self.bucket}/variant-{self.variant:03d}/rows-{self.first:09d}.parquet"


def shards(spec: CacheSpec) -> Iterator[Shard]:
    """Every shard of a complete cache, the first variant's first: what the first epoch wants comes first."""
    for variant in range(spec.variants):
        for bucket, (rows, step) in enumerate(zip(spec.bucket_rows, spec.shard_rows, strict=True)):
            for first in range(0, rows, step):
                yield Shard(bucket, variant, first, min(first + step, rows))


def path_of(spec: CacheSpec, shard: Shard) -> Path:
    return spec.path / shard.name


def place_of(spec: CacheSpec, bucket: int, variant: int, row: int) -> tuple[Shard, int, int]:
    """(shard, row group in it, row in the group) of a row of a bucket."""
    step, group = spec.shard_rows[bucket], spec.group_rows[bucket]
    first, inside = row - row % step, row % step
    shard = Shard(bucket, variant, first, min(first + step, spec.bucket_rows[bucket]))
    return shard, inside // group, inside % group
