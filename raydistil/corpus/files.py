"""Files of rows: .jsonl, .csv, .parquet and .txt (one text a line). Blank lines are no rows.

Every complaint names the file and the row, and is for `BadRows` to make.
"""

import csv
import glob
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydistil.corpus.bad import BadRows
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


def read_records(path: Path, bad: BadRows) -> Iterator[Record]:
    return READERS[path.suffix](path, bad)


def _lines(path: Path, bad: BadRows) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one so that a bad byte has a line number; a byte order mark is left out."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf8")
            except UnicodeDecodeError as error:
                bad.add(_no_text(path, number, error))
                continue
            yield number, text.removesuffix("\n").removesuffix("\r")


def _no_text(path: Path, number: int, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    return DataError(
        f"{path}:{number}: expected UTF-8 text, got byte 0x{byte:02x} at column {error.start + 1}: "
        f"convert the file, for example with iconv -t UTF-8"
    )


def _read_jsonl(path: Path, bad: BadRows) -> Iterator[Record]:
    for number, line in _lines(path, bad):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # beside bad JSON: a number too long, a list too deep
            bad.add(DataError(f"{path}:{number}: expected one JSON object a line, got {line[:40]!r}: {error}"))
            continue
        if isinstance(value, dict):
            yield number, value
        else:
            kind = type(value).__name__
            bad.add(DataError(f"{path}:{number}: expected a JSON object, got {kind}: write one a line"))


def _read_csv(path: Path, bad: BadRows) -> Iterator[Record]:
    header: list[str] = []
    for start, row in _csv_rows(path, bad):
        if not header:
            header = row
        elif len(row) == len(header):
            yield start, dict(zip(header, row, strict=True))
        else:
            expected = f"expected {len(header)} columns as in the header, got {len(row)}: mend it"
            bad.add(DataError(f"{path}:{start}: {expected}"))


def _csv_rows(path: Path, bad: BadRows) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of every row that is not blank. Strict: a quote that never ends would swallow the rest."""
    reader = csv.reader((line + "\n" for _, line in _lines(path, bad)), strict=True)
    while True:
        start = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            bad.add(DataError(f"{path}:{start}: expected a row of CSV, got a bad one: {error}: mend the row"))
            continue
        if row is None:
            return
        if row:
            yield start, row


def _read_parquet(path: Path, bad: BadRows) -> Iterator[Record]:
    """Row group by row group: one that is damaged takes none of the others with it."""
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)  # where there are checksums
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    with file:
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            yield from _read_group(path, file, group, range(first + 1, first + rows + 1), bad)
            first += rows


def _read_group(path: Path, file: pq.ParquetFile, group: int, rows: range, bad: BadRows) -> Iterator[Record]:
    read = 0
    try:
        for batch in file.iter_batches(batch_size=1024, row_groups=[group]):
            for row in batch.to_pylist():
                yield rows[read], row
                read += 1
    except (pa.ArrowException, OSError) as error:
        what = f"row group {group} (rows {rows[0]} to {rows[-1]}) is damaged after {read} rows: {error}"
        bad.add(DataError(f"{path}: {what}: write the file anew"), rows=len(rows) - read)


def _read_txt(path: Path, bad: BadRows) -> Iterator[Record]:
    for number, line in _lines(path, bad):
        if line.strip():
            yield number, {"text": line}


READERS: dict[str, Callable[[Path, BadRows], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
