"""Packing: texts into full blocks of `length` tokens, with no padding but in the very last block of a split.

Masked language modelling: `[CLS] text [SEP] text [SEP] ... [SEP]`. Causal language modelling: documents, `[bos] text
eos [bos] text eos ...`, with a mark where each begins; one that a block's end cuts goes on in the next block as a
document of its own, with no bos, and the token across the cut is nobody's label.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raydistil.errors import ModelError
from raydistil.types import SPLITS, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Block = tuple[list[int], list[int] | None]  # (ids, 1 where a document begins; None: that is not kept)


class Packer:
    """Cuts the stream of texts of each split into full blocks."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", length: int) -> None:
        self._tokenizer = tokenizer
        self._room = length - 2
        self._pending: dict[Split, list[int]] = {split: [] for split in SPLITS}

    def add(self, split: Split, ids: list[int]) -> Iterator[Block]:
        first, last = edges(self._tokenizer)
        pending = self._pending[split]
        pending += ids if not pending else [*last, *ids]
        while len(pending) >= self._room:
            yield [*first, *pending[: self._room], *last], None
            del pending[: self._room]

    def rest(self) -> Iterator[tuple[Split, list[int], None]]:
        for split, pending in self._pending.items():
            if pending:
                first, last = edges(self._tokenizer)
                yield split, [*first, *pending, *last], None


class DocumentPacker:
    """Cuts the stream of documents of each split into full blocks, and keeps where each begins."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", length: int) -> None:
        self._first, self._last = document_edges(tokenizer)
        self._length = length
        self._pending: dict[Split, list[int]] = {split: [] for split in SPLITS}
        self._starts: dict[Split, list[int]] = {split: [] for split in SPLITS}

    def add(self, split: Split, ids: list[int]) -> Iterator[Block]:
        document = [*self._first, *ids, *self._last]
        pending, starts = self._pending[split], self._starts[split]
        pending += document
        starts += [1] + [0] * (len(document) - 1)
        while len(pending) >= self._length:
            yield pending[: self._length], [1, *starts[1 : self._length]]
            del pending[: self._length], starts[: self._length]

    def rest(self) -> Iterator[tuple[Split, list[int], list[int]]]:
        for split, pending in self._pending.items():
            if pending:
                yield split, pending, [1, *self._starts[split][1:]]


def edges(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Tokens before and after a single text. Raises ModelError for a tokenizer that has none."""
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    if first is None or last is None:
        raise ModelError("expected an encoder's tokenizer, with [CLS] and [SEP], got one without: use an encoder")
    return [first], [last]


@dataclass(frozen=True, slots=True)
class Joints:
    """Tokens before, between and after two texts."""

    first: list[int]
    middle: list[int]
    last: list[int]

    def room(self, first: list[int], length: int) -> int:
        """Tokens of a second text that fit into a row of `length`."""
        return length - len(self.joined(first, [])[0])

    def joined(self, first: list[int], second: list[int]) -> tuple[list[int], int]:
        """(a row, where its second text begins)."""
        before = [*self.first, *first, *self.middle]
        return [*before, *second, *self.last], len(before)


def joints(tokenizer: "PreTrainedTokenizerBase") -> Joints:
    """As the tokenizer joins two texts: [CLS] a [SEP] b [SEP], or with two separators between."""
    first, last = edges(tokenizer)
    one: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    pair: list[int] = tokenizer("a", "a")["input_ids"]
    middle = pair[len(first) + len(one) : len(pair) - len(one) - len(last)]
    return Joints(first, middle, last)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts are kept where both together have `room`: as many of each, or all of the shorter
    one. As tokenizers cut pairs.
    """
    if first + second <= room:
        return first, second
    short = min(first, second, room // 2)
    return (short, room - short) if first <= second else (room - short, short)


def document_edges(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Tokens before and after a document: bos, where the tokenizer has one that differs from eos, and eos.

    Raises ModelError for a tokenizer without eos.
    """
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    if last is None:
        raise ModelError("expected a decoder's tokenizer, with an eos token, got one without: use a decoder")
    return [] if first is None or first == last else [first], [last]
