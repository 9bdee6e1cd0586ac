"""Targets out of the cache: what the teacher would have sent of a micro-batch, bit for bit as it was written."""

from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydistil.cache.columns import real_ids, wire_of
from raydistil.cache.files import Broken, metadata_of, open_shard
from raydistil.cache.layout import Shard, path_of, place_of
from raydistil.errors import StorageError
from raydistil.manifest import Ints
from raydistil.specs import CacheSpec
from raydistil.types import TokenBatch

OPEN_FILES = 128
GROUPS_KEPT = 64  # row groups that are at hand; some 256 KiB each


class CachedTargets:
    """A complete cache, open for reading."""

    def __init__(self, spec: CacheSpec) -> None:
        self._spec = spec
        self._open = lru_cache(OPEN_FILES)(self._opened)
        self._group = lru_cache(GROUPS_KEPT)(self._read)

    def columns(self, batch: TokenBatch, bucket: int, variant: int, rows: Ints) -> dict[str, bytes]:
        """The wire's columns of a micro-batch made of `rows` of a bucket.

        Raises StorageError where a file is broken, or is about other tokens than the batch's.
        """
        places = [place_of(self._spec, bucket, variant, row) for row in rows.tolist()]
        groups = {key: self._group(*key) for key in {(shard, group) for shard, group, _ in places}}
        picked = [groups[shard, group].slice(inside, 1) for shard, group, inside in places]
        table = pa.concat_tables(picked).combine_chunks()
        self._check(batch, rows, table, places[0][0])
        return wire_of(self._spec.targets, table, metadata_of(self._open(places[0][0]))["classes"])

    def _opened(self, shard: Shard) -> pq.ParquetFile:
        try:
            return open_shard(path_of(self._spec, shard))
        except Broken as error:
            raise self._broken(shard, str(error)) from error

    def _read(self, shard: Shard, number: int) -> pa.Table:
        try:
            return self._open(shard).read_row_group(number, use_threads=False)
        except Broken as error:
            raise self._broken(shard, str(error)) from error

    def _check(self, batch: TokenBatch, rows: Ints, table: pa.Table, shard: Shard) -> None:
        real_BL = np.arange(batch.input_ids_BL.shape[1])[None, :] < batch.lengths_B[:, None]
        same_rows = np.array_equal(table["row"].to_numpy(), rows)
        if not same_rows or not np.array_equal(real_ids(table), batch.input_ids_BL[real_BL]):
            raise self._broken(shard, "it is about other tokens")

    def _broken(self, shard: Shard, reason: str) -> StorageError:
        path = path_of(self._spec, shard)
        return StorageError(
            f"expected the targets of {shard.num_rows} rows in {path}, cannot read them ({reason}): remove the file "
            f"and run again, it is then written anew"
        )
