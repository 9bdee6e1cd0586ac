"""What a token store holds, and reading it out of the memory map."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raydistil.manifest import Ints
from raydistil.tokens import files
from raydistil.tokens.examples import Question
from raydistil.types import SPLITS, Content, Labels, Split


@dataclass(slots=True)
class SplitCounts:
    """What became of the texts of one split."""

    texts: int = 0
    rows: int = 0
    tokens: int = 0
    padding: int = 0
    truncated: int = 0
    unplaced: int = 0  # words without a token of their own, answers that no window holds whole
    too_short: int = 0
    too_unknown: int = 0
    buckets: dict[int, int] = field(default_factory=dict)  # padded length -> rows
    labelled: dict[int, int] = field(default_factory=dict)  # padded length -> rows that have a label; they come first
    classes: dict[str, int] = field(default_factory=dict)  # class -> rows
    numbers: tuple[float, float] | None = None  # the least and the greatest label, where those are numbers

    @property
    def labelled_rows(self) -> int:
        return sum(self.labelled.values())


@dataclass(frozen=True, slots=True)
class StoreMeta:
    """What a token store is; `meta.json` beside its files."""

    vocab_size: int
    pad_id: int
    mask_id: int
    special_ids: tuple[int, ...]
    labels: tuple[str, ...]  # class names in the order of their ids; none where there are no classes
    splits: dict[Split, SplitCounts]
    notes: tuple[str, ...]
    content: Content  # what a row is
    joint: tuple[int, ...] | None = None  # between the two texts of a row that is a pair; None: there are no pairs

    @property
    def pairs(self) -> bool:
        return self.joint is not None


class TokenStore:
    """A written token store, memory-mapped: opening costs a millisecond, reading touches only the rows asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta = _read_meta(path)
        self._maps: dict[tuple[Split, int], list[pa.RecordBatch]] = {}

    def lengths(self, split: Split) -> tuple[int, ...]:
        """Padded lengths of the buckets of `split`, ascending; a bucket's place here is its number."""
        return tuple(sorted(self.meta.splits[split].buckets))

    def bucket_rows(self, split: Split, labelled: bool = False) -> tuple[int, ...]:
        """Rows of each bucket, in the order of `lengths`: all, or those with a label, which come first."""
        counts = self.meta.splits[split]
        rows = counts.labelled if labelled else counts.buckets
        return tuple(rows.get(length, 0) for length in self.lengths(split))

    def read(self, split: Split, bucket: int, rows: Ints) -> tuple[NDArray[np.int32], NDArray[np.int32], Labels]:
        """(ids [B, L], lengths [B], labels [B]) of `rows` of a bucket, int32; IGNORE where there is no label.

        Labels that are numbers: float32, and nan where there is none.
        """
        length = self.lengths(split)[bucket]
        batches = self._mapped(split, length)
        ids = np.empty((len(rows), length), np.int32)
        lengths = np.empty(len(rows), np.int32)
        labels: Labels = np.empty(len(rows), np.int32)
        if self.meta.content == "numbers":
            labels = labels.astype(np.float32)
        for place, row in enumerate(rows.tolist()):
            batch, inside = batches[row // files.ROWS_PER_BATCH], row % files.ROWS_PER_BATCH
            values = batch.column(0).values.to_numpy()
            ids[place] = values[inside * length : (inside + 1) * length]
            lengths[place] = batch.column(1)[inside].as_py()
            labels[place] = batch.column(2)[inside].as_py()
        return ids, lengths, labels

    def extra(self, split: Split, bucket: int, rows: Ints, name: str) -> NDArray[Any]:
        """[B, W] of a column that goes with the content, see `files.EXTRAS`."""
        length = self.lengths(split)[bucket]
        batches, extra = self._mapped(split, length), files.EXTRAS[name]
        width = extra.width(length)
        found = np.empty((len(rows), width), extra.dtype)
        for place, row in enumerate(rows.tolist()):
            batch, inside = batches[row // files.ROWS_PER_BATCH], row % files.ROWS_PER_BATCH
            found[place] = batch.column(name).values.to_numpy()[inside * width : (inside + 1) * width]
        return found

    def questions(self, split: Split) -> list[Question]:
        """In the order of their numbers."""
        path = self.path / files.questions_name(split)
        return [Question(**row) for row in pq.read_table(path).to_pylist()] if path.exists() else []

    def token_counts(self) -> NDArray[np.int64]:
        """[V] how often each token occurs in the training split."""
        counts: NDArray[np.int64] = np.load(self.path / "token_counts.npy")
        return counts

    def _mapped(self, split: Split, length: int) -> list[pa.RecordBatch]:
        if (split, length) not in self._maps:
            reader = pa.ipc.open_file(pa.memory_map(str(self.path / files.bucket_name(split, length))))
            self._maps[split, length] = [reader.get_batch(n) for n in range(reader.num_record_batches)]
        return self._maps[split, length]


def _read_meta(path: Path) -> StoreMeta:
    raw = json.loads((path / "meta.json").read_text())
    splits: dict[Split, SplitCounts] = {}
    for split in SPLITS:
        counts = raw["splits"][split]
        counts |= {key: {int(length): n for length, n in counts[key].items()} for key in ("buckets", "labelled")}
        counts["numbers"] = tuple(counts["numbers"]) if counts.get("numbers") else None
        splits[split] = SplitCounts(**counts)
    raw["joint"] = None if raw.get("joint") is None else tuple(raw["joint"])
    raw |= {"splits": splits} | {key: tuple(raw[key]) for key in ("special_ids", "labels", "notes")}
    return StoreMeta(**raw)
