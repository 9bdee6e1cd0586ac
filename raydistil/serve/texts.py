"""Texts of requests as tokens: cut to what the model takes, with what was cut and where each token stands.

The tokenizer's Rust part alone is used, which several threads may call at once. A text is cut by its characters before
it is read: of one of a million, no more than the model could take costs anything.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from raydistil.errors import ModelError
from raydistil.packing import edges, joints, longest_first
from raydistil.tokens.examples import Tokens, windows

CHARACTERS = 64  # of a token, at most, that are read of a text; longer words than that are rare
WORD = re.compile(r"\w+|[^\w\s]")
STRIDE = 4  # windows of a long context share a quarter of their length

Truncate = Literal["right", "left", "error"]
Given = str | tuple[str, str]  # a text, or two that belong together


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row for the model."""

    ids: NDArray[np.int32]  # special ones included
    places: NDArray[np.int32]  # [L, 2] where each token stands in its text, -1 for special ones
    cut_ids: tuple[int, ...]  # what did not fit
    unread: str = ""  # what was so far beyond that nobody read it
    context: int | None = None  # of two texts: the first token of the second one

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def is_cut(self) -> bool:
        return bool(self.cut_ids or self.unread)


class Reader:
    """Texts to rows. Safe to call from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
        """`longest`: tokens of a row. Raises ModelError for a tokenizer without a Rust part."""
        if not tokenizer.is_fast:
            raise ModelError(f"expected a tokenizer.json, {type(tokenizer).__name__} is Python only")
        self.longest = longest
        self._backend: Any = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._first, self._last = edges(tokenizer)
        self._joints = joints(tokenizer)

    def inputs(self, given: Sequence[Given], truncate: Truncate) -> list[Encoded]:
        """A row of each."""
        if all(isinstance(each, str) for each in given):
            return self.texts([each for each in given if isinstance(each, str)], truncate)
        left = truncate == "left"
        return [
            self.texts([each], truncate)[0] if isinstance(each, str) else self._pair(each, left) for each in given
        ]  # fmt: skip

    def texts(self, texts: Sequence[str], truncate: Truncate) -> list[Encoded]:
        """A row of each."""
        left, most = truncate == "left", self.longest * CHARACTERS
        starts = [max(0, len(text) - most) if left else 0 for text in texts]
        read = self._read([text[start : start + most] for text, start in zip(texts, starts, strict=True)])
        return [
            self._row(tokens, text, start, most, left) for tokens, text, start in zip(read, texts, starts, strict=True)
        ]

    def _pair(self, texts: tuple[str, str], left: bool) -> Encoded:
        """As it was trained on: what is too long is taken from the longer text first."""
        parts, most = self._joints, self.longest * CHARACTERS
        seen = [text[-most:] if left else text[:most] for text in texts]
        read, unread = self._read(seen), sum(map(len, texts)) > sum(map(len, seen))
        if unread and any(len(tokens.ids) < 2 * self.longest for tokens in read):
            read, unread = self._read(list(texts)), False
        kept = longest_first(len(read[0].ids), len(read[1].ids), parts.room([], self.longest))
        first, second = (_side(tokens.ids, count, left) for tokens, count in zip(read, kept, strict=True))
        ids, begun = parts.joined(first[0], second[0])
        beyond, nowhere = "".join(texts) if unread else "", np.full((len(ids), 2), -1, np.int32)
        return Encoded(np.array(ids, np.int32), nowhere, (*first[1], *second[1]), beyond, begun)

    def questions(self, question: str, context: str, length: int, most: int) -> list[Encoded]:
        """The first `most` windows of one question, the question cut to half of them."""
        asked, held = self._read([question, context])
        kept, cut = asked.ids[: length // 2], tuple(asked.ids[length // 2 :])
        return [
            Encoded(
                np.array(row.ids, np.int32), _padded(row.extras["chars"], len(row.ids)), cut,
                context=row.extras["context"][0],
            )
            for row in islice(windows(kept, held, None, self._joints, length, length // STRIDE, 0), most)
        ]  # fmt: skip

    def _read(self, texts: list[str]) -> list[Tokens]:
        return [Tokens(each.ids, each.offsets) for each in self._backend.encode_batch(texts, add_special_tokens=False)]

    def _row(self, tokens: Tokens, text: str, start: int, most: int, left: bool) -> Encoded:
        """Of `most` characters from `start` on; of the whole text where those are so few tokens that more might fit."""
        room, unread = self.longest - len(self._first) - len(self._last), text[:start] + text[start + most :]
        if unread and len(tokens.ids) < 2 * room:
            (tokens,), start, unread = self._read([text]), 0, ""
        over = max(0, len(tokens.ids) - room)
        kept, cut = (tokens[over:], tokens.ids[:over]) if left else (tokens[:room], tokens.ids[room:])
        ids = np.array([*self._first, *kept.ids, *self._last], np.int32)
        places = np.full((len(ids), 2), -1, np.int32)
        places[len(self._first) : len(ids) - len(self._last)] = np.reshape(kept.places, (-1, 2))
        places[places >= 0] += start
        return Encoded(ids, places, tuple(cut), unread)


def _side(ids: list[int], count: int, left: bool) -> tuple[list[int], list[int]]:
    """(what is kept, what is cut)."""
    over = len(ids) - count
    return (ids[over:], ids[:over]) if left else (ids[:count], ids[count:])


def _padded(chars: Sequence[int], length: int) -> NDArray[np.int32]:
    """[L, 2]: the last tokens, which are special ones, have no place."""
    whole = np.full((length, 2), -1, np.int32)
    whole[: len(chars) // 2] = np.reshape(chars, (-1, 2))
    return whole


def words(places_L2: NDArray[np.int32], text: str) -> Iterator[tuple[int, int, int]]:
    """(first token, first character, the character after the last) of each word, or other sign, that has a token."""
    tokens = [(token, start, end) for token, (start, end) in enumerate(places_L2.tolist()) if 0 <= start < end]
    at = 0
    for word in WORD.finditer(text):
        while at < len(tokens) and tokens[at][2] <= word.start():
            at += 1
        if at < len(tokens) and tokens[at][1] < word.end():
            yield tokens[at][0], word.start(), word.end()
