"""Files of rows: .jsonl, .csv, .parquet and .txt (one text a line). Blank lines are no rows.

Every complaint names the file and the row, and is for `BadRows` to make.
"""

import csv
import glob
import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydistil.corpus.bad import BadRows
from raydistil.errors import DataError

Record = tuple[int, dict[str, Any]]  # 1-based line or row number, columns
QUOTED = re.compile(r'(?:^|(?<=,))"(?:[^"]|"")*"(?=,|$)')  # a field, as it has to be
csv.field_size_limit(1 << 22)  # characters: a document; what a quote that never ends takes is read again


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
    """(first line, fields) of every row that is not blank. A quote that never ends takes no row but its own."""
    lines = Again(_lines(path, bad))
    while (row := lines.row(path, bad)) is not None:
        if row:
            yield lines.taken[0][0], row


class Again:
    """Lines of CSV, of which those that a bad row has taken beside its first are read again, each as a row's first."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self._lines, self._ahead = lines, deque[tuple[int, str]]()
        self.taken: list[tuple[int, str]] = []  # by the row

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.taken.append(self._ahead.popleft() if self._ahead else next(self._lines))
        return self.taken[-1][1] + "\n"

    def row(self, path: Path, bad: BadRows) -> list[str] | None:
        """The next one; without fields where it is bad, or blank. None: there is no more."""
        self.taken.clear()
        taken_before = bool(self._ahead)
        try:
            row = next(csv.reader(self, strict=True), None)
            if taken_before and '"' in QUOTED.sub("", "\n".join(line for _, line in self.taken)):
                raise csv.Error("a quote in a field without quotes: the rest of a row before")
        except csv.Error as error:
            start = self.taken[0][0]
            bad.add(DataError(f"{path}:{start}: expected a row of CSV, got a bad one: {error}: mend the row"))
            self._ahead.extendleft(reversed(self.taken[1:]))
            return []
        return row


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
            columns = [_values(column) for column in batch.columns]
            for row in zip(*columns, strict=True):
                yield rows[read], dict(zip(batch.schema.names, row, strict=True))
                read += 1
    except (pa.ArrowException, OSError) as error:
        what = f"row group {group} (rows {rows[0]} to {rows[-1]}) is damaged after {read} rows: {error}"
        bad.add(DataError(f"{path}: {what}: write the file anew"), rows=len(rows) - read)


def _values(column: pa.Array) -> list[Any]:
    """As Python has them. In the place of one that it cannot have, text that is no UTF-8 or a time beyond the calendar,
    stands why: where nobody asks for it, it does no harm.
    """
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError) as error:
        if len(column) == 1:
            return [error]
        return [value for n in range(len(column)) for value in _values(column[n : n + 1])]


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
