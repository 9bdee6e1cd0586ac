"""Columns of a source, and typed rows out of its records.

What a row is of depends on the content that is asked for: a text or a pair of texts (as GLUE has them), alone or with
a class or a number; words with the class of each (as CoNLL has them); a question, the context that holds its answer,
and the answers (as SQuAD has them).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from raydistil.config import CorpusConfig
from raydistil.corpus.bad import BadRows
from raydistil.corpus.caps import Caps
from raydistil.corpus.split import split_of
from raydistil.errors import DataError
from raydistil.types import Answer, Content, Split, TextRow

TEXT_COLUMNS = ("text", "sentence", "content", "document", "review", "question")
WORD_COLUMNS = ("tokens", "words")
QUESTION_COLUMNS = ("question", "query", "text")
CONTEXT_COLUMNS = ("context", "passage", "paragraph", "document")
PAIRS = (  # of columns that are known to be a pair's
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("text", "text_pair"),
)  # fmt: skip
LABEL_COLUMNS: dict[Content, tuple[str, ...]] = {
    "classes": ("label", "labels", "class", "category", "target"), "numbers": ("label", "labels", "score", "target"),
    "tags": ("ner_tags", "tags", "labels", "pos_tags", "chunk_tags"), "answers": ("answers", "answer"),
}  # fmt: skip
LARGEST = 3.4028234663852886e38  # of float32, in which numbers are kept


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns hold the text and, for labelled data, what is known of it."""

    text: str
    label: str | None
    no_label: int | None = None  # a class number that stands for none, beside null and an empty cell
    content: Content = field(default="classes", repr=False)  # not in the fingerprint: token stores tell them apart
    absent: tuple[str, ...] = field(default=(), repr=False)  # that the first row lacks, so that no later one may have
    context: str | None = None
    pair: str | None = None
    names: tuple[str, ...] = ()  # of tags that are numbers


def choose_columns(
    config: CorpusConfig, first: dict[str, Any], where: str, content: Content, needed: bool
) -> tuple[Columns, tuple[str, ...]]:
    """The configured columns, else guessed ones with a note for each guess. `needed`: there must be one of labels."""
    candidates = {"tags": WORD_COLUMNS, "answers": QUESTION_COLUMNS}.get(content, TEXT_COLUMNS)
    pair = config.pair_column
    guessed = _pair(config, first, content)
    if guessed is not None:
        text, pair = guessed
        text_note: str | None = f"pairs guessed: {text!r} with {pair!r} (corpus.text_column names the only text)"
    else:
        text, text_note = _choose(config.text_column, candidates, first, where, "text")
    context, context_note = None, None
    if content == "answers":
        context, context_note = _choose(config.context_column, CONTEXT_COLUMNS, first, where, "context")
    label, label_note = _choose_label(config, first, where, content, needed)
    absent = LABEL_COLUMNS.get(content, ()) if label is None else ()
    notes = tuple(note for note in (text_note, context_note, label_note) if note)
    return Columns(text, label, content=content, absent=absent, context=context, pair=pair), notes


def _pair(config: CorpusConfig, first: dict[str, Any], content: Content) -> tuple[str, str] | None:
    """Two columns by whose names pairs are known, where the configuration names none."""
    if content not in ("classes", "numbers") or config.text_column is not None or config.pair_column is not None:
        return None
    return next((pair for pair in PAIRS if all(name in first for name in pair)), None)


def _choose_label(
    config: CorpusConfig, first: dict[str, Any], where: str, content: Content, needed: bool
) -> tuple[str | None, str | None]:
    known = LABEL_COLUMNS.get(content, ())
    if not known:
        return None, None
    if not needed and config.label_column is None and not any(name in first for name in known):
        return None, "no label column: the teacher alone labels the texts (corpus.label_column names one)"
    return _choose(config.label_column, known, first, where, "label")


def _choose(
    configured: str | None, candidates: tuple[str, ...], first: dict[str, Any], where: str, role: str
) -> tuple[str, str | None]:
    if configured is not None:
        return configured, None
    guess = next((name for name in candidates if name in first), None)
    if guess is None:
        raise DataError(
            f"{where}: expected a {role} column ({', '.join(candidates)}), found {', '.join(first) or 'none'}: "
            f"name it with corpus.{role}_column"
        )
    return guess, f"{role} column guessed: {guess!r} (corpus.{role}_column names another)"


def to_rows(
    records: Iterator[tuple[str, dict[str, Any]]],
    columns: Columns,
    config: CorpusConfig,
    split: Split | None,
    bad: BadRows,
) -> Iterator[TextRow]:
    """Typed rows of the records, as far as the caps want them; `split` None: by a hash of the text, or the context."""
    caps = Caps(config)
    for where, record in records:
        if caps.full:
            return
        try:
            row = _row(record, columns, where, split or "train")
        except DataError as error:
            bad.add(error)
            continue
        if caps.open(row.label):
            caps.count(row.label)
            yield row if split else replace(row, split=split_of(row.context or row.text, config))


def _row(record: dict[str, Any], columns: Columns, where: str, split: Split) -> TextRow:
    """Raises DataError for a record that cannot be one."""
    given = _cell(record, columns.text, where, "text")
    if columns.content == "tags":
        words = _words(given, columns.text, where)
        return TextRow(" ".join(words), None, where, split, words, _tags(record, columns, where, len(words)))
    text = _text(given, columns.text, where)
    if columns.context is None:
        pair = None if columns.pair is None else _text(
            _cell(record, columns.pair, where, "pair"), columns.pair, where
        )  # fmt: skip
        return TextRow(text, _label(record, columns, where), where, split, pair=pair)
    context = _text(_cell(record, columns.context, where, "context"), columns.context, where)
    answers = _answers(record, columns, where, context)
    return TextRow(text, None, where, split, context=context, answers=answers)


def _refuse_label(record: dict[str, Any], columns: Columns, where: str) -> None:
    """Raise DataError for a label after a first row that has no column of them."""
    for name in columns.absent:
        if name in record:
            raise DataError(
                f"{where}: expected no label, as in the first row, found the column {name!r}: give every row one (null "
                f"where there is none), or name it with corpus.label_column"
            )


def _cell(record: dict[str, Any], column: str, where: str, role: str) -> Any:
    if column not in record:
        raise DataError(
            f"{where}: expected the {role} column {column!r}, found {', '.join(map(str, record)) or 'none'}: "
            f"mend the row or name another with corpus.{role}_column"
        )
    return record[column]


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text in column {column!r}, got {type(value).__name__}: mend the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half a surrogate pair in column {column!r} is no text: mend the row") from error
    return value


def _label(record: dict[str, Any], columns: Columns, where: str) -> str | None:
    """The class or the number, or None for a row that has none: only a teacher can say what it is."""
    if columns.label is None:
        _refuse_label(record, columns, where)
        return None
    value = _cell(record, columns.label, where, "label")
    if columns.content == "numbers":
        return None if value is None or value == "" else _number(value, columns.label, where)
    if value is None or value == "" or value != value or (columns.no_label is not None and value == columns.no_label):
        return None
    if isinstance(value, float) and value.is_integer():  # whole numbers in a column that lacks some
        value = int(value)
    if isinstance(value, bool | int | str):
        return _text(str(value), columns.label, where)
    raise DataError(f"{where}: expected a class as text or whole number, or null, got {value!r}: mend the row")


def _number(value: Any, column: str, where: str) -> str:
    """A finite float32, as it is written."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST:
        raise DataError(f"{where}: expected a finite number in column {column!r}, or null, got {value!r}: mend the row")
    return repr(number)


def _words(value: Any, column: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise DataError(f"{where}: expected a list of words in column {column!r}, got {value!r:.40}: mend the row")
    words = tuple(_text(word, column, where) for word in value)
    if not all(word.strip() for word in words):
        raise DataError(f"{where}: expected words in column {column!r}, got an empty one: mend the row")
    return words


def _tags(record: dict[str, Any], columns: Columns, where: str, count: int) -> tuple[str, ...] | None:
    """One for each word; None where none are known."""
    value = _label_cell(record, columns, where)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != count:
        got = f"{len(value)}" if isinstance(value, list) else f"{value!r:.40}"
        raise DataError(
            f"{where}: expected a class for each of the {count} words in column {columns.label!r}, got {got}: mend "
            f"the row"
        )
    return tuple(_tag(tag, columns, where) for tag in value)


def _tag(value: Any, columns: Columns, where: str) -> str:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        if not columns.names:
            return str(value)
        if 0 <= value < len(columns.names):
            return columns.names[value]
    raise DataError(f"{where}: expected classes of words as text or numbers, got {value!r}: mend the row")


def _answers(record: dict[str, Any], columns: Columns, where: str, context: str) -> tuple[Answer, ...] | None:
    """Spans of the context; None where they are not known."""
    value = _label_cell(record, columns, where)
    return None if value is None else tuple(_answer(each, where, context) for each in _pairs(value, where))


def _label_cell(record: dict[str, Any], columns: Columns, where: str) -> Any:
    if columns.label is None:
        _refuse_label(record, columns, where)
        return None
    return _cell(record, columns.label, where, "label")


def _pairs(value: Any, where: str) -> list[tuple[Any, Any]]:
    """(start, text) of every answer: of SQuAD's lists beside each other, or of a list of objects."""
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        starts, texts = value.get("answer_start"), value["text"]
        if isinstance(starts, list) and len(starts) == len(texts):
            return list(zip(starts, texts, strict=True))
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        return [(each.get("answer_start"), each.get("text")) for each in value]
    raise DataError(
        f"{where}: expected answers as {{'text': [...], 'answer_start': [...]}} or a list of {{'text', "
        f"'answer_start'}}, got {value!r:.60}: mend the row"
    )


def _answer(given: tuple[Any, Any], where: str, context: str) -> Answer:
    start, text = given
    if not isinstance(text, str) or not text or not isinstance(start, int) or isinstance(start, bool):
        raise DataError(f"{where}: expected an answer with text and answer_start, got {given!r:.60}: mend the row")
    found = context[max(0, start) : start + len(text)]
    if start < 0 or found != text:
        raise DataError(
            f"{where}: expected the answer {text!r:.40} at character {start} of the context, found {found!r:.40}: "
            f"mend answer_start"
        )
    return Answer(start, text)
