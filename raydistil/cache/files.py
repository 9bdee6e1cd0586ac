"""One shard of the cache as a Parquet file: written whole or not at all, read a few rows at a time, checked.

Every column is split into byte streams and then compressed with zstd: of MiniLM's fp16 states that leaves about nine
tenths, of bf16 as floats less than bf16 takes. Pages carry checksums. Row groups are small, since
training reads rows in a shuffled order and a group is the least that can be read.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydistil.storage import whole_file

METADATA = b"raydistil"
Broken = (OSError, pa.ArrowException, ValueError, KeyError)  # what reading a file that is not whole ends in


def write_shard(path: Path, table: pa.Table, group_rows: int, metadata: dict[str, Any]) -> None:
    """Raises StorageError where the disk is full; nothing is left then."""
    marked = table.replace_schema_metadata({METADATA: json.dumps(metadata)})
    streams = {_leaf(field.name, field.type): "BYTE_STREAM_SPLIT" for field in table.schema}
    with whole_file(path) as scratch:
        pq.write_table(
            marked, scratch, row_group_size=group_rows, compression="zstd", use_dictionary=False,
            column_encoding=streams, write_statistics=False, write_page_checksum=True,
        )  # fmt: skip


def _leaf(name: str, kind: pa.DataType) -> str:
    """Parquet's name of the numbers of a column."""
    while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        name, kind = f"{name}.list.element", kind.value_type
    return name


def open_shard(path: Path) -> pq.ParquetFile:
    """Raises one of `Broken` where the file is cut short; so does reading a page that is not as it was written."""
    return pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)


def metadata_of(file: pq.ParquetFile) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.schema_arrow.metadata[METADATA])
    return found


def fault_of(path: Path, num_rows: int, expected: dict[str, Any]) -> str | None:
    """What is wrong with a file, in a few words, after a look at every byte that counts; None: nothing.

    `expected`: of its metadata.
    """
    try:
        file = open_shard(path)
        if file.metadata.num_rows != num_rows or not expected.items() <= metadata_of(file).items():
            return "it holds other rows"
        for number in range(file.num_row_groups):
            file.read_row_group(number, use_threads=False)
    except Broken as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None
