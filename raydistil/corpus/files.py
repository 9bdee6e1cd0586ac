"""Files of rows: .jsonl, .csv, .parquet and .txt (one text a line). Blank lines are no rows.

Every complaint names the file and the row.
"""

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
    whole = Path(pattern).is_file()  # a file whose name looks like a glob
    matches = [pattern] if whole else glob.glob(pattern, recursive=True)  # noqa: PTH207 (Path.glob: relative ones only)
    paths = sorted(path for path in map(Path, matches) if path.is_file())
    if not paths:
        raise DataError(f"{key}: expected a file or a glob that matches some, found nothing at {pattern}")
    for path in paths:
        if path.suffix not in READERS:
            raise DataError(f"{key}: {path} is of no known kind: use {', '.join(sorted(READERS))}")
    return paths


def is_file_pattern(source: str) -> bool:
    """Whether `source` names files rather than a hub data set."""
    return Path(source).suffix in READERS or any(sign in source for sign in "*?[") or Path(source).is_file()


def read_records(path: Path) -> Iterator[Record]:
    return READERS[path.suffix](path)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one so that a bad byte has a line number; a byte order mark is left out."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf8")
                yield number, text.removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                bad = error.object[error.start]
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
        except (ValueError, RecursionError) as error:  # beside bad JSON: a number too long, a list too deep
            raise DataError(f"{path}:{number}: expected one JSON object a line, got {line[:40]!r}: {error}") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, got {type(value).__name__}: write one a line")
        yield number, value


def _read_csv(path: Path) -> Iterator[Record]:
    header: list[str] = []
    for start, row in _csv_rows(path):
        if not header:
            header = row
        elif len(row) != len(header):
            raise DataError(f"{path}:{start}: expected {len(header)} columns as in the header, got {len(row)}: mend it")
        else:
            yield start, dict(zip(header, row, strict=True))


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of every row that is not blank. Strict: a quote that never ends would swallow the rest."""
    reader = csv.reader((line + "\n" for _, line in _lines(path)), strict=True)
    while True:
        start = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:{start}: expected a row of CSV, got a bad one: {error}: mend the row") from error
        if row is None:
            return
        if row:
            yield start, row


def _read_parquet(path: Path) -> Iterator[Record]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file after row {number}: {error}") from error


def _read_txt(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        if line.strip():
            yield number, {"text": line}


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
