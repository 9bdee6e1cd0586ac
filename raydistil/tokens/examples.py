"""Rows of a token store out of labelled examples: a text, words with classes, or a question and its context.

Two texts are joined as their tokenizer joins them; what is too long is taken from the longer one first.
Words: the class of a word is that of its first token, as CoNLL's scores count words. A question goes before its context
(Devlin et al. 2019); a context that is too long is cut into windows that share `stride` tokens, each a row of its own,
whose answer is its first token, [CLS], where it does not hold the whole span.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from raydistil.packing import Joints
from raydistil.types import IGNORE, NO_TAG, Answer, TextRow

Ids = list[int]
Places = list[tuple[int, int]]  # where each token begins and ends in its text


@dataclass(frozen=True, slots=True)
class Example:
    """A row: its tokens without padding, its label (IGNORE or nan where there is none), and what its content adds."""

    ids: Ids
    label: float = IGNORE
    extras: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Question:
    """What the windows of one question are scored by."""

    context: str
    answers: list[str] | None  # none of them: it has no answer; None: nobody knows


@dataclass(frozen=True, slots=True)
class Tokens:
    """Those of a text, special ones left out."""

    ids: Ids
    places: Places

    def __getitem__(self, part: slice) -> "Tokens":
        return Tokens(self.ids[part], self.places[part])


def first_tokens(words: tuple[str, ...], places: Places) -> list[int | None]:
    """Which token each word begins with, the text being the words with spaces between; None: it has no token."""
    owner = [number for number, word in enumerate(words) for _ in range(len(word) + 1)]
    found: dict[int, int] = {}
    for token, (start, end) in enumerate(places):
        if end > start:  # a token may begin with the space before its word
            found.setdefault(owner[end - 1], token)
    return [found.get(number) for number in range(len(words))]


def tags_of(row: TextRow, tokens: Tokens, ids: Mapping[str, int]) -> tuple[list[int], int]:
    """(the label of each token, how many words have none)."""
    labels = [IGNORE] * len(tokens.ids)
    firsts = first_tokens(row.words, tokens.places)
    for number, token in enumerate(firsts):
        if token is not None:
            labels[token] = NO_TAG if row.tags is None else ids[row.tags[number]]
    return labels, firsts.count(None)


def windows(
    question: Ids, context: Tokens, answers: tuple[Answer, ...] | None, joints: Joints, length: int, stride: int,
    number: int,
) -> Iterator[Example]:  # fmt: skip
    """Rows of at most `length` tokens, the first answer being the one that is learned."""
    room = joints.room(question, length)
    start = 0
    while True:
        part = context[start : start + room]
        span = _span(part.places, answers)
        ids, begun = joints.joined(question, part.ids)
        shifted = [IGNORE, IGNORE] if span is None else [begun + at if at >= 0 else 0 for at in span]
        chars = [-1] * (2 * begun) + [edge for place in part.places for edge in place]
        yield Example(ids, extras={"span": shifted, "context": [begun], "chars": chars, "question": [number]})
        if start + room >= len(context.ids):
            return
        start += room - stride


def _span(places: Places, answers: tuple[Answer, ...] | None) -> tuple[int, int] | None:
    """First and last token of the answer; (-1, -1): not all of it is here; None: nobody knows it."""
    if answers is None:
        return None
    if not answers or not places:
        return -1, -1
    start, end = answers[0].start, answers[0].start + len(answers[0].text)
    if start < places[0][0] or end > places[-1][1]:
        return -1, -1
    held = [token for token, (begins, ends) in enumerate(places) if begins < end and ends > start]
    return (held[0], held[-1]) if held else (-1, -1)
