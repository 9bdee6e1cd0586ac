"""Files of rows: .jsonl, .csv, .parquet and .txt (one text a line). Every complaint names the file and the row."""

import csv
import glob
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydistil.errors import DataError

Record = tuple[int, dict[str, Any]]  # 1-based line or row number, columns


def expand(pattern: str, key: str) -> list[Path]:
    """The files `pattern` (a path or a glob) stands for, sorted. Raises DataError where there are none."""
    paths = sorted(Path(match) for match in glob.glob(pattern, recursive=True) if Path(match).is_file())
    if not paths:
        raise DataError(f"{key}: expected a file or a glob that matches some, found nothing at {pattern}")
    for path in paths:
        if path.suffix not in READERS:
            raise DataError(f"{key}: {path} is of no known kind: use {', '.join(sorted(READERS))}")
    return paths


def is_file_pattern(source: str) -> bool:
    """Whether `source` names files rather than a hub data set."""
    return Path(source).suffix in READERS or any(sign in source for sign in "*?[") or Path(source).exists()


def read_records(path: Path) -> Iterator[Record]:
    return READERS[path.suffix](path)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one so that a bad byte has a line number."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf8").removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                bad = line[error.start]
                raise DataError(
                    f"{path}:{number}: expected UTF-8 text, got byte 0x{bad:02x} at column {error.start + 1}: "
                    f"convert the file, for example with iconv -t UTF-8"
                ) from error


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: expected one JSON object a line, got {line[:40]!r}: {error}") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, got {type(value).__name__}: write one a line")
        yield number, value


def _read_csv(path: Path) -> Iterator[Record]:
    reader = csv.reader(line + "\n" for _, line in _lines(path))
    header = next(reader, None)
    if not header:
        return
    while True:
        start = reader.line_num + 1
        row = next(reader, None)
        if row is None:
            return
        if not row:
            continue
        if len(row) != len(header):
            raise DataError(f"{path}:{start}: expected {len(header)} columns as in the header, got {len(row)}")
        yield start, dict(zip(header, row, strict=True))


def _read_parquet(path: Path) -> Iterator[Record]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file after row {number}: {error}") from error


def _read_txt(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        yield number, {"text": line}


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
