"""Pairs of texts out of docstrings; words with classes and questions with answers out of those that describe parameters
as numpydoc does.

    axis : int, optional
        Axis along which ...

Pairs: a docstring's summary with what follows it ("same"), and with what follows another one of its library ("other").
Words: the name is a PARAM, what follows the colon its TYPE (B-, I-, O). Questions: what the type of a parameter is.
Docstrings without such a section have no question, and words of no class.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b

from raydistil.types import Answer, Content, TextRow

FORMAT = 1  # raise when other rows come out of the same docstrings
SECTION = re.compile(r"^(Parameters|Other Parameters|Attributes)\n-{3,}\n", re.MULTILINE)
NEXT = re.compile(r"^[A-Z][A-Za-z ]+\n-{3,}\n", re.MULTILINE)
FIELD = re.compile(r"^(?P<name>\*{0,2}[A-Za-z_]\w*) ?: ?(?P<type>\S[^\n]*?)[ .]*$", re.MULTILINE)
WORD = re.compile(r"\w+|[^\w\s]")
QUESTIONS = 2  # of a docstring, at most
QUESTION = "What is the type of {name}?"
REST = "rest"  # of a docstring, below its summary
SHORTEST = 20  # characters of each text of a pair
Span = tuple[int, int]
Kind = tuple[Span, str] | None


def of(content: Content, rows: list[TextRow]) -> Iterator[TextRow]:
    """The rows themselves, or what they hold of words with classes or questions with answers."""
    if content == "tags":
        return (tagged(row) for row in rows if fields(row.text))
    if content == "answers":
        return (question for row in rows for question in questions(row))
    return iter(rows)


def pairs(rows: list[TextRow]) -> Iterator[TextRow]:
    """Two of each docstring that has both parts; the other of its library's in the same split goes by a hash."""
    pools: dict[tuple[str | None, str], list[tuple[TextRow, str, str]]] = {}
    for row in rows:
        summary, _, rest = (part.strip() for part in row.text.partition("\n\n"))
        if min(len(summary), len(rest)) >= SHORTEST:
            pools.setdefault((row.label, row.split), []).append((row, summary, rest))
    for pool in pools.values():
        for place, (row, summary, rest) in enumerate(pool):
            yield replace(row, text=summary, pair=rest, label="same")
            other = pool[_other(row.source, place, len(pool))][2]
            if other != rest:
                yield replace(row, text=summary, pair=other, label="other")


def _other(source: str, place: int, count: int) -> int:
    """Some place of so many but this one, where there is another."""
    drawn = int.from_bytes(blake2b(source.encode(), digest_size=8).digest())
    return (place + 1 + drawn % max(1, count - 1)) % count


def fields(text: str) -> list[tuple[Span, Span]]:
    """Where the name and the type of each described parameter stand, in their order."""
    found = []
    for section in SECTION.finditer(text):
        following = NEXT.search(text, section.end())
        end = following.start() if following else len(text)
        found += [(match.span("name"), match.span("type")) for match in FIELD.finditer(text, section.end(), end)]
    return found


def questions(row: TextRow) -> Iterator[TextRow]:
    """On a few of the parameters whose name is described once, wherever in the text they are."""
    found = fields(row.text)
    names = [row.text[slice(*name)] for name, _ in found]
    once = [(name, place) for name, (_, place) in zip(names, found, strict=True) if names.count(name) == 1]
    chosen = sorted(once, key=lambda each: blake2b(f"{row.source}:{each[0]}".encode(), digest_size=8).digest())
    for name, (start, end) in once:
        if (name, (start, end)) in chosen[:QUESTIONS]:
            answer = Answer(start, row.text[start:end])
            yield replace(
                row, text=QUESTION.format(name=name), label=None, context=row.text, answers=(answer,),
                source=f"{row.source}:{name}",
            )  # fmt: skip


def tagged(row: TextRow) -> TextRow:
    """Its words with their classes."""
    places = [match.span() for match in WORD.finditer(row.text)]
    spans: list[Kind] = [
        (span, kind) for pair in fields(row.text) for span, kind in zip(pair, ("PARAM", "TYPE"), strict=True)
    ]
    kinds = [_kind(place, spans) for place in places]
    befores = [None, *(kinds[:-1])]
    tags = tuple(_tag(kind, before) for kind, before in zip(kinds, befores, strict=True))
    words = tuple(row.text[start:end] for start, end in places)
    return replace(row, text=" ".join(words), label=None, words=words, tags=tags)


def _kind(place: Span, spans: list[Kind]) -> Kind:
    inside = (each for each in spans if each and each[0][0] <= place[0] and place[1] <= each[0][1])
    return next(inside, None)


def _tag(kind: Kind, before: Kind) -> str:
    if kind is None:
        return "O"
    return f"{'I' if kind == before else 'B'}-{kind[1]}"
