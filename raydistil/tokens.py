"""tokens: rows -> token store, written once as memory-mapped Arrow IPC and reused while its inputs are the same.

Language modelling packs texts into full blocks (see `packing`). Labelled examples stay whole, cut at `length`, and are
stored by padded length (bucket), those with a label first, so a micro-batch of one bucket wastes little and the
labelled rows can be had alone. Nothing is left out silently: the counts are in `meta.json`.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raydistil.config import TokensConfig, digest
from raydistil.corpus import Corpus
from raydistil.errors import DataError
from raydistil.manifest import Ints
from raydistil.packing import DocumentPacker, Packer, edges
from raydistil.storage import cache_dir, whole_directory
from raydistil.types import IGNORE, SPLITS, Labels, Split, TextRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 3  # raise when the layout of a store changes
TEXTS_AT_ONCE = 512
ROWS_PER_BATCH = 4096


@dataclass(slots=True)
class SplitCounts:
    """What became of the texts of one split."""

    texts: int = 0
    rows: int = 0
    tokens: int = 0
    padding: int = 0
    truncated: int = 0
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
    labels: tuple[str, ...]  # class names in the order of their ids; empty for numbers and for packed blocks
    splits: dict[Split, SplitCounts]
    notes: tuple[str, ...]
    documents: bool = False  # whether blocks keep where each document begins
    numbers: bool = False  # whether labels are numbers


def build_store(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", config: TokensConfig, labelled: bool, documents: bool = False,
    classes: tuple[str, ...] = (),
) -> Path:  # fmt: skip
    """The directory of the token store for these inputs; written if it is not in the cache yet.

    `labelled`: examples in buckets; `documents`: blocks that keep where each document begins; neither: plain blocks.
    `classes`: what a teacher calls them, in the order of its ids.

    Raises DataError when the training split comes out empty or a labelled one has fewer than two classes.
    """
    inputs = [FORMAT, corpus.fingerprint, tokenizer_hash(tokenizer), config.model_dump(mode="json"), labelled]
    inputs += ["documents"] * documents + ["numbers"] * corpus.numbers
    root = cache_dir() / "tokens"
    path, named = root / digest(inputs), root / digest([*inputs, classes])
    if classes and not named.is_symlink():
        if named.exists() or data_classes(corpus.rows()) != classes:
            path = named
        else:  # the teacher calls them as the data does, so the store is the one of a run that does not ask it
            _link(named, path)
    if not path.exists():
        with whole_directory(path) as scratch:
            _Writer(scratch, tokenizer, config, corpus, labelled, documents, classes).write()
    return path


def _link(named: Path, path: Path) -> None:
    """So that the next run need not read the corpus to know."""
    named.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        named.symlink_to(path.name)


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Equal for tokenizers that cut and number texts alike, whatever else (padding, truncation) they are set to do."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest([tokenizer.get_vocab(), sorted(tokenizer.all_special_ids)])
    parts = json.loads(backend.to_str())
    content = [parts[name] for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
    return digest([content, sorted(tokenizer.all_special_ids)])


def data_classes(rows: Iterable[TextRow]) -> tuple[str, ...]:
    """In the order of their ids: whole numbers by value, so that they are ids where they already were."""
    names = {row.label for row in rows if row.label is not None}
    numbers = all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))


def class_names(rows: Iterable[TextRow], known: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The `known` ones where no row has another, else those of the rows. Raises DataError for fewer than two."""
    names = data_classes(rows)
    if len(known) > 1 and set(names) <= set(known):
        return known
    if len(names) < 2:
        raise DataError(f"expected at least two classes, found {', '.join(names) or 'no label'}: check the labels")
    return names


class _Writer:
    """One pass over a corpus into one directory."""

    def __init__(
        self, path: Path, tokenizer: "PreTrainedTokenizerBase", config: TokensConfig, corpus: Corpus, labelled: bool,
        documents: bool, classes: tuple[str, ...],
    ) -> None:  # fmt: skip
        self._path = path
        self._tokenizer = tokenizer
        self._config = config
        self._corpus = corpus
        self._documents = documents
        self._labelled, self._numbers = labelled, labelled and corpus.numbers
        self._labels = class_names(corpus.rows(), classes) if labelled and not corpus.numbers else ()
        self._ids = {label: number for number, label in enumerate(self._labels)}
        self._buckets = (*sorted(config.buckets), config.length) if labelled else (config.length,)
        self._counts: dict[Split, SplitCounts] = {split: SplitCounts() for split in SPLITS}
        self._token_counts = np.zeros(len(tokenizer), np.int64)
        self._files: dict[tuple[Split, int], _BucketFile] = {}

    def write(self) -> None:
        packer = DocumentPacker if self._documents else Packer
        pack = packer(self._tokenizer, self._config.length)
        for row, ids in self._tokenized():
            if self._labelled:
                self._add_example(row, ids)
            else:
                for block, starts in pack.add(row.split, ids):
                    self._add(row.split, block, self._config.length, None, starts)
        for split, block, starts in pack.rest():
            self._add(split, block, self._config.length, None, starts)
        for file in self._files.values():
            file.close()
        if not self._counts["train"].rows:
            raise DataError(f"expected texts to train on, found none {self._losses()}: the corpus is empty")
        np.save(self._path / "token_counts.npy", self._token_counts)
        (self._path / "meta.json").write_text(json.dumps(asdict(self._meta()), indent=1))

    def _rows(self) -> Iterator[TextRow]:
        """All rows; of labelled examples those that have no label come last."""
        if not self._labelled:
            return self._corpus.rows()
        have = (row for row in self._corpus.rows() if row.label is not None)
        lack = (row for row in self._corpus.rows() if row.label is None)
        return chain(have, lack)

    def _tokenized(self) -> Iterator[tuple[TextRow, list[int]]]:
        """Rows with their tokens, special ones excluded, less those the configuration leaves out (counted)."""
        rows = self._rows()
        while chunk := list(islice(rows, TEXTS_AT_ONCE)):
            encoded = self._tokenizer([row.text for row in chunk], add_special_tokens=False, verbose=False)
            for row, ids in zip(chunk, encoded["input_ids"], strict=True):
                if self._kept(row, ids):
                    yield row, ids

    def _kept(self, row: TextRow, ids: list[int]) -> bool:
        counts = self._counts[row.split]
        counts.texts += 1
        if len(ids) < max(1, self._config.min_tokens):
            counts.too_short += 1
            return False
        unknown = self._tokenizer.unk_token_id
        if unknown is not None and ids.count(unknown) > self._config.max_unknown_share * len(ids):
            counts.too_unknown += 1
            return False
        return True

    def _add_example(self, row: TextRow, ids: list[int]) -> None:
        room = self._config.length - 2
        self._counts[row.split].truncated += len(ids) > room
        block = [*edges(self._tokenizer)[0], *ids[:room], *edges(self._tokenizer)[1]]
        bucket = next(length for length in self._buckets if length >= len(block))
        self._add(row.split, block, bucket, row.label)

    def _add(
        self, split: Split, block: list[int], bucket: int, label: str | None, starts: list[int] | None = None
    ) -> None:  # fmt: skip
        counts = self._counts[split]
        counts.rows += 1
        counts.tokens += len(block)
        counts.padding += bucket - len(block)
        counts.buckets[bucket] = counts.buckets.get(bucket, 0) + 1
        if label is not None:
            _count_label(counts, bucket, label, self._numbers)
        if split == "train":
            np.add.at(self._token_counts, block, 1)
        if (split, bucket) not in self._files:
            pad = _pad_id(self._tokenizer)
            path = self._path / _file_name(split, bucket)
            self._files[split, bucket] = _BucketFile(path, bucket, pad, self._documents, self._numbers)
        self._files[split, bucket].add(block, self._stored(label), starts)

    def _stored(self, label: str | None) -> float:
        if self._numbers:
            return math.nan if label is None else float(label)
        return IGNORE if label is None else self._ids[label]

    def _losses(self) -> str:
        counts = self._counts["train"]
        return f"({counts.texts} texts, {counts.too_short} too short, {counts.too_unknown} with too many unknown)"

    def _meta(self) -> StoreMeta:
        tokenizer = self._tokenizer
        mask = tokenizer.mask_token_id
        return StoreMeta(
            vocab_size=len(tokenizer), pad_id=_pad_id(tokenizer), mask_id=-1 if mask is None else mask,
            special_ids=tuple(sorted(tokenizer.all_special_ids)), labels=self._labels, splits=self._counts,
            notes=self._corpus.notes + self._corpus.left_out(), documents=self._documents, numbers=self._numbers,
        )  # fmt: skip


def _count_label(counts: SplitCounts, bucket: int, label: str, numbers: bool) -> None:
    counts.labelled[bucket] = counts.labelled.get(bucket, 0) + 1
    if numbers:
        found = [float(label), *(counts.numbers or ())]
        counts.numbers = min(found), max(found)
    else:
        counts.classes[label] = counts.classes.get(label, 0) + 1


def _pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


class _BucketFile:
    """Rows of one padded length, appended to one Arrow file."""

    def __init__(self, path: Path, length: int, pad_id: int, documents: bool, numbers: bool) -> None:
        self._length = length
        self._pad_id = pad_id
        self._label_type = np.dtype(np.float32 if numbers else np.int32)
        label = pa.from_numpy_dtype(self._label_type)
        self._schema = pa.schema([("ids", pa.list_(pa.int32(), length)), ("length", pa.int32()), ("label", label)])
        if documents:
            self._schema = self._schema.append(pa.field("starts", pa.list_(pa.uint8(), length)))
        self._writer = pa.ipc.new_file(path, self._schema)
        self._rows: list[list[int]] = []
        self._labels: list[float] = []
        self._starts: list[list[int]] = []

    def add(self, block: list[int], label: float, starts: list[int] | None) -> None:
        self._rows.append(block)
        self._labels.append(label)
        self._starts += [] if starts is None else [starts]
        if len(self._rows) == ROWS_PER_BATCH:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if not self._rows:
            return
        lengths = np.array([len(block) for block in self._rows], np.int32)
        columns = [self._padded(self._rows, self._pad_id, np.int32)]
        columns += [pa.array(lengths), pa.array(np.array(self._labels, self._label_type))]
        if self._starts:
            columns.append(self._padded(self._starts, 1, np.uint8))
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._rows, self._labels, self._starts = [], [], []

    def _padded(self, rows: list[list[int]], fill: int, dtype: type[np.integer[Any]]) -> pa.FixedSizeListArray:
        padded = np.full((len(rows), self._length), fill, dtype)
        for number, row in enumerate(rows):
            padded[number, : len(row)] = row
        return pa.FixedSizeListArray.from_arrays(pa.array(padded.ravel()), self._length)


def _file_name(split: Split, length: int) -> str:
    return f"{split}-{length:05d}.arrow"


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
        if self.meta.numbers:
            labels = labels.astype(np.float32)
        for place, row in enumerate(rows.tolist()):
            batch, inside = batches[row // ROWS_PER_BATCH], row % ROWS_PER_BATCH
            values = batch.column(0).values.to_numpy()
            ids[place] = values[inside * length : (inside + 1) * length]
            lengths[place] = batch.column(1)[inside].as_py()
            labels[place] = batch.column(2)[inside].as_py()
        return ids, lengths, labels

    def starts(self, split: Split, bucket: int, rows: Ints) -> NDArray[np.uint8]:
        """[B, L], 1 where a document begins, and at padding; of blocks that keep it."""
        length = self.lengths(split)[bucket]
        batches = self._mapped(split, length)
        found = np.empty((len(rows), length), np.uint8)
        for place, row in enumerate(rows.tolist()):
            batch, inside = batches[row // ROWS_PER_BATCH], row % ROWS_PER_BATCH
            found[place] = batch.column(3).values.to_numpy()[inside * length : (inside + 1) * length]
        return found

    def token_counts(self) -> NDArray[np.int64]:
        """[V] how often each token occurs in the training split."""
        counts: NDArray[np.int64] = np.load(self.path / "token_counts.npy")
        return counts

    def _mapped(self, split: Split, length: int) -> list[pa.RecordBatch]:
        if (split, length) not in self._maps:
            reader = pa.ipc.open_file(pa.memory_map(str(self.path / _file_name(split, length))))
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
    raw |= {"splits": splits} | {key: tuple(raw[key]) for key in ("special_ids", "labels", "notes")}
    return StoreMeta(**raw)
