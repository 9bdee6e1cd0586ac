"""The files of a token store: one Arrow file for each split and padded length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raydistil.tokens.examples import Example
from raydistil.types import IGNORE, Content, Split

ROWS_PER_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Extra:
    """A column of lists that goes with a content."""

    dtype: type[np.integer[Any]]
    width: Callable[[int], int]  # of a padded length
    fill: int


EXTRAS = {
    "starts": Extra(np.uint8, lambda length: length, 1),  # 1 where a document begins, and at padding
    "tags": Extra(np.int32, lambda length: length, IGNORE),  # the class of each word, at its first token
    "span": Extra(np.int32, lambda length: 2, IGNORE),  # the answer's first and last token
    "context": Extra(np.int32, lambda length: 1, 0),  # the first token of the context, or of a pair's second text
    "chars": Extra(np.int32, lambda length: 2 * length, -1),  # where each token begins and ends in the context
    "question": Extra(np.int32, lambda length: 1, 0),  # number of the question
}
CONTENT_EXTRAS: dict[Content, tuple[str, ...]] = {
    "documents": ("starts",), "tags": ("tags",), "answers": ("span", "context", "chars", "question"),
}  # fmt: skip


def extras_of(content: Content, pairs: bool) -> tuple[str, ...]:
    return ("context",) if pairs else CONTENT_EXTRAS.get(content, ())


def bucket_name(split: Split, length: int) -> str:
    return f"{split}-{length:05d}.arrow"


def questions_name(split: Split) -> str:
    return f"{split}-questions.parquet"


class BucketFile:
    """Rows of one padded length, appended to one Arrow file."""

    def __init__(self, path: Path, length: int, pad_id: int, content: Content, pairs: bool) -> None:
        self._length = length
        self._pad_id = pad_id
        self._label_type = np.dtype(np.float32 if content == "numbers" else np.int32)
        self._extras = extras_of(content, pairs)
        label = pa.from_numpy_dtype(self._label_type)
        self._schema = pa.schema([("ids", pa.list_(pa.int32(), length)), ("length", pa.int32()), ("label", label)])
        for name in self._extras:
            kind = pa.list_(pa.from_numpy_dtype(EXTRAS[name].dtype), EXTRAS[name].width(length))
            self._schema = self._schema.append(pa.field(name, kind))
        self._writer = pa.ipc.new_file(path, self._schema)
        self._rows: list[Example] = []

    def add(self, row: Example) -> None:
        self._rows.append(row)
        if len(self._rows) == ROWS_PER_BATCH:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if not self._rows:
            return
        lengths = np.array([len(row.ids) for row in self._rows], np.int32)
        labels = np.array([row.label for row in self._rows], self._label_type)
        columns = [_padded([row.ids for row in self._rows], self._length, self._pad_id, np.int32)]
        columns += [pa.array(lengths), pa.array(labels)]
        for name in self._extras:
            extra, values = EXTRAS[name], [row.extras[name] for row in self._rows]
            columns.append(_padded(values, extra.width(self._length), extra.fill, extra.dtype))
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._rows = []


def _padded(
    rows: list[Sequence[int]], width: int, fill: int, dtype: type[np.integer[Any]]
) -> pa.FixedSizeListArray:  # fmt: skip
    padded = np.full((len(rows), width), fill, dtype)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return pa.FixedSizeListArray.from_arrays(pa.array(padded.ravel()), width)
