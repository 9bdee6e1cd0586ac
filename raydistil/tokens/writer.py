"""Rows -> token store, written once as memory-mapped Arrow IPC and reused while its inputs are the same.

Language modelling packs texts into full blocks (see `packing`). Examples stay whole, cut at `length` (a question's
context into windows), and are stored by padded length (bucket), those with a label first, so a micro-batch of one
bucket wastes little and the labelled rows can be had alone. Nothing is left out silently: the counts are in
`meta.json`.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydistil.config import TokensConfig, digest
from raydistil.corpus import Corpus
from raydistil.errors import DataError, ModelError
from raydistil.packing import DocumentPacker, Packer, edges, joints, longest_first
from raydistil.storage import cache_dir, whole_directory
from raydistil.tokens.examples import Example, Tokens, tags_of, windows
from raydistil.tokens.files import BucketFile, bucket_name, questions_name
from raydistil.tokens.store import SplitCounts, StoreMeta
from raydistil.types import IGNORE, SPLITS, Content, Split, TextRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 4  # raise when the layout of a store changes
TEXTS_AT_ONCE = 512
STRIDE = 4  # windows share a quarter of their length, unless the configuration says how much


def build_store(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", config: TokensConfig, content: Content,
    classes: tuple[str, ...] = (),
) -> Path:  # fmt: skip
    """The directory of the token store for these inputs; written if it is not in the cache yet.

    `content`: what `corpus` was opened for. `classes`: what a teacher calls them, in the order of its ids.

    Raises DataError when the training split comes out empty or there are fewer than two classes, ModelError for a
    tokenizer that cannot say where its tokens stand in a text, where that is needed.
    """
    inputs = [FORMAT, corpus.fingerprint, tokenizer_hash(tokenizer), config.model_dump(mode="json"), content]
    root = cache_dir() / "tokens"
    path, named = root / digest(inputs), root / digest([*inputs, classes])
    if classes and not named.is_symlink():
        if named.exists() or data_classes(corpus.rows()) != classes:
            path = named
        else:  # the teacher calls them as the data does, so the store is the one of a run that does not ask it
            _link(named, path)
    if not path.exists():
        with whole_directory(path) as scratch:
            _Writer(scratch, tokenizer, config, corpus, content, classes).write()
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
    names = {name for row in rows for name in (row.label, *(row.tags or ())) if name is not None}
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
        self, path: Path, tokenizer: "PreTrainedTokenizerBase", config: TokensConfig, corpus: Corpus, content: Content,
        classes: tuple[str, ...],
    ) -> None:  # fmt: skip
        self._path = path
        self._tokenizer = tokenizer
        self._config = config
        self._corpus = corpus
        self._content = content
        self._packed, self._pairs = content in ("blocks", "documents"), corpus.pairs
        self._labels = class_names(corpus.rows(), classes) if content in ("classes", "tags") else ()
        self._ids = {label: number for number, label in enumerate(self._labels)}
        self._buckets = (config.length,) if self._packed else (*sorted(config.buckets), config.length)
        self._counts: dict[Split, SplitCounts] = {split: SplitCounts() for split in SPLITS}
        self._token_counts = np.zeros(len(tokenizer), np.int64)
        self._files: dict[tuple[Split, int], BucketFile] = {}
        self._questions: dict[Split, list[TextRow]] = {split: [] for split in SPLITS}

    def write(self) -> None:
        self._pack() if self._packed else self._add_examples()
        for file in self._files.values():
            file.close()
        for split, rows in self._questions.items():
            _write_questions(self._path / questions_name(split), rows)
        if not self._counts["train"].rows:
            raise DataError(f"expected texts to train on, found none {self._losses()}: the corpus is empty")
        np.save(self._path / "token_counts.npy", self._token_counts)
        (self._path / "meta.json").write_text(json.dumps(asdict(self._meta()), indent=1))

    def _pack(self) -> None:
        documents = self._content == "documents"
        pack = (DocumentPacker if documents else Packer)(self._tokenizer, self._config.length)
        for row, tokens in self._tokenized():
            for block, starts in pack.add(row.split, tokens.ids):
                self._add(row.split, _block(block, starts))
        for split, block, starts in pack.rest():
            self._add(split, _block(block, starts))

    def _add_examples(self) -> None:
        add = self._add_windows if self._content == "answers" else self._add_pair if self._pairs else self._add_example
        for row, tokens in self._tokenized():
            add(row, tokens)

    def _rows(self) -> Iterator[TextRow]:
        """All rows; of labelled examples those that have no label come last."""
        if self._packed:
            return self._corpus.rows()
        have = (row for row in self._corpus.rows() if row.is_labelled)
        lack = (row for row in self._corpus.rows() if not row.is_labelled)
        return chain(have, lack)

    def _tokenized(self) -> Iterator[tuple[TextRow, Tokens]]:
        """Rows with their tokens, special ones excluded, less those the configuration leaves out (counted)."""
        rows, placed = self._rows(), self._content == "tags"
        while chunk := list(islice(rows, TEXTS_AT_ONCE)):
            encoded = encode(self._tokenizer, [row.text for row in chunk], placed)
            for row, tokens in zip(chunk, encoded, strict=True):
                if self._kept(row, tokens.ids):
                    yield row, tokens

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

    def _add_example(self, row: TextRow, tokens: Tokens) -> None:
        first, last = edges(self._tokenizer)
        room, counts = self._config.length - len(first) - len(last), self._counts[row.split]
        counts.truncated += len(tokens.ids) > room
        extras = {}
        if self._content == "tags":
            labels, lost = tags_of(row, tokens, self._ids)
            counts.unplaced += lost
            extras = {"tags": [*[IGNORE] * len(first), *labels[:room]]}
        example = Example([*first, *tokens.ids[:room], *last], self._stored(row.label), extras)
        self._add(row.split, example, row.is_labelled)
        self._count_labels(row)

    def _add_pair(self, row: TextRow, first: Tokens) -> None:
        assert row.pair is not None
        (second,), parts = encode(self._tokenizer, [row.pair], False), joints(self._tokenizer)
        room = parts.room([], self._config.length)
        kept, rest = longest_first(len(first.ids), len(second.ids), room)
        self._counts[row.split].truncated += len(first.ids) + len(second.ids) > room
        ids, begun = parts.joined(first.ids[:kept], second.ids[:rest])
        self._add(row.split, Example(ids, self._stored(row.label), {"context": [begun]}), row.is_labelled)
        self._count_labels(row)

    def _add_windows(self, row: TextRow, question: Tokens) -> None:
        assert row.context is not None
        counts, asked, length = self._counts[row.split], self._questions[row.split], self._config.length
        (context,), most = encode(self._tokenizer, [row.context], True), length // 2
        counts.truncated += len(question.ids) > most
        stride = self._config.stride or length // STRIDE
        ids, parts = question.ids[:most], joints(self._tokenizer)
        made = list(windows(ids, context, row.answers, parts, length, stride, len(asked)))
        asked.append(row)
        counts.unplaced += bool(row.answers) and not any(each.extras["span"][0] for each in made)
        for example in made:
            self._add(row.split, example, row.is_labelled)

    def _add(self, split: Split, row: Example, labelled: bool = False) -> None:
        counts, size = self._counts[split], len(row.ids)
        bucket = next(length for length in self._buckets if length >= size)
        counts.rows += 1
        counts.tokens += size
        counts.padding += bucket - size
        counts.buckets[bucket] = counts.buckets.get(bucket, 0) + 1
        if labelled:
            counts.labelled[bucket] = counts.labelled.get(bucket, 0) + 1
        if split == "train":
            np.add.at(self._token_counts, row.ids, 1)
        if (split, bucket) not in self._files:
            path, pad = self._path / bucket_name(split, bucket), _pad_id(self._tokenizer)
            self._files[split, bucket] = BucketFile(path, bucket, pad, self._content, self._pairs)
        self._files[split, bucket].add(row)

    def _stored(self, label: str | None) -> float:
        if self._content == "numbers":
            return math.nan if label is None else float(label)
        return self._ids[label] if self._content == "classes" and label is not None else IGNORE

    def _count_labels(self, row: TextRow) -> None:
        counts = self._counts[row.split]
        if self._content == "numbers" and row.label is not None:
            found = [float(row.label), *(counts.numbers or ())]
            counts.numbers = min(found), max(found)
        names = {"classes": (row.label,), "tags": row.tags or ()}.get(self._content, ())
        for name in names:
            if name is not None:
                counts.classes[name] = counts.classes.get(name, 0) + 1

    def _losses(self) -> str:
        counts = self._counts["train"]
        return f"({counts.texts} texts, {counts.too_short} too short, {counts.too_unknown} with too many unknown)"

    def _meta(self) -> StoreMeta:
        tokenizer = self._tokenizer
        mask = tokenizer.mask_token_id
        return StoreMeta(
            vocab_size=len(tokenizer), pad_id=_pad_id(tokenizer), mask_id=-1 if mask is None else mask,
            special_ids=tuple(sorted(tokenizer.all_special_ids)), labels=self._labels, splits=self._counts,
            notes=self._corpus.notes + self._corpus.left_out(), content=self._content,
            joint=tuple(joints(tokenizer).middle) if self._pairs else None,
        )  # fmt: skip


def _block(ids: list[int], starts: list[int] | None) -> Example:
    return Example(ids, extras={} if starts is None else {"starts": starts})


def encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str], placed: bool) -> list[Tokens]:
    """Their tokens, special ones left out; `placed`: with where they stand in the text."""
    if placed and not tokenizer.is_fast:
        raise ModelError(
            f"expected a tokenizer that knows where its tokens stand in a text, {type(tokenizer).__name__} is Python "
            f"only: use a model with a tokenizer.json"
        )
    found = tokenizer(texts, add_special_tokens=False, verbose=False, return_offsets_mapping=placed)
    places = found["offset_mapping"] if placed else [[]] * len(texts)
    return [Tokens(ids, where) for ids, where in zip(found["input_ids"], places, strict=True)]


def _write_questions(path: Path, rows: list[TextRow]) -> None:
    if rows:
        answers = [None if row.answers is None else [answer.text for answer in row.answers] for row in rows]
        context = pa.array([row.context for row in rows], pa.string())
        pq.write_table(pa.table({"context": context, "answers": pa.array(answers, pa.list_(pa.string()))}), path)


def _pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
