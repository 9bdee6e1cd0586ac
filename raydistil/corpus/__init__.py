"""corpus: sources -> rows with a text, a label, an origin and a split.

A corpus is opened once: that settles the columns (guesses are noted, to be printed) and a fingerprint of the content,
so that what is made from it can be reused. Its rows can then be read any number of times, always the same.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydistil.config import CorpusConfig, digest
from raydistil.corpus import python_docs
from raydistil.corpus.bad import BadRows
from raydistil.corpus.caps import Caps
from raydistil.corpus.files import expand, is_file_pattern, read_records
from raydistil.corpus.split import split_of, with_shared_label
from raydistil.errors import ConfigError, DataError
from raydistil.storage import cache_dir, whole_directory
from raydistil.types import SPLITS, Split, TextRow

TEXT_COLUMNS = ("text", "sentence", "content", "document", "review", "question")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target")
NUMBER_COLUMNS = ("label", "labels", "score", "target")
LARGEST = 3.4028234663852886e38  # of float32, in which numbers are kept


@dataclass(frozen=True, slots=True)
class Corpus:
    """Rows that can be read again, a fingerprint of their content, and what the user should know of them."""

    rows: Callable[[], Iterator[TextRow]]
    fingerprint: str
    notes: tuple[str, ...]
    numbers: bool = False  # whether labels are numbers, not classes
    left_out: Callable[[], tuple[str, ...]] = tuple  # what to say of bad rows, when all have been read once


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns hold the text and, for labelled data, the class or the number."""

    text: str
    label: str | None
    no_label: int | None = None  # a class number that stands for none, beside null and an empty cell
    numbers: bool = field(default=False, repr=False)  # not in the fingerprint: token stores tell them apart
    absent: tuple[str, ...] = field(default=(), repr=False)  # that the first row lacks, so that no later one may have


@dataclass(frozen=True, slots=True)
class _Labels:
    """What is asked of a corpus."""

    any: bool
    numbers: bool
    needed: bool


def open_corpus(config: CorpusConfig, labelled: bool, numbers: bool = False, needed: bool = True) -> Corpus:
    """The corpus `config` names; `labelled`: its texts have labels, `needed`: it cannot do without a column of them;
    `numbers`: they are finite numbers instead of classes.

    Raises DataError, naming file and row, for what cannot be used, ConfigError for keys that do not go together.
    """
    wanted = _Labels(labelled, numbers, needed)
    corpus = replace(_open(config, wanted), numbers=numbers)
    if config.labelled_share == 1:
        return corpus
    share = config.labelled_share
    return replace(
        corpus,
        rows=lambda: (with_shared_label(row, share) for row in corpus.rows()),
        fingerprint=digest([corpus.fingerprint, share]),
    )


def _open(config: CorpusConfig, wanted: _Labels) -> Corpus:
    if config.source != "python-docs" and is_file_pattern(config.source):
        return _open_files(config, wanted)
    if config.validation_source or config.test_source:
        raise ConfigError(
            f"corpus.validation_source and corpus.test_source go with files as corpus.source, got {config.source!r}: "
            f"leave them out"
        )
    if config.source != "python-docs":
        return _open_hub(config, wanted)
    if wanted.numbers:
        raise ConfigError("corpus.source: python-docs has classes and no numbers: use task classification")
    return _open_python_docs(config)


# ---- python-docs


def _open_python_docs(config: CorpusConfig) -> Corpus:
    files = python_docs.list_files(config.libraries)
    sizes = [(file.module, file.path.stat().st_size) for file in files]
    shape = [python_docs.FORMAT, config.model_dump(mode="json"), sizes]
    path = cache_dir() / "corpus" / digest(shape)
    rows = _cached(path, files)
    if rows is None:
        reading = python_docs.read(config, files)
        rows = reading.rows
        _cache(path, reading)
    hashed = digest([(row.text, row.label, row.split) for row in rows])
    return Corpus(lambda: iter(rows), hashed, ())


def _cache(path: Path, reading: python_docs.Reading) -> None:
    columns = {name: [getattr(row, name) for row in reading.rows] for name in TextRow.__slots__}
    with whole_directory(path) as scratch:
        pq.write_table(pa.table(columns), scratch / "rows.parquet", compression="zstd")
        (scratch / "hashes.json").write_text(json.dumps(reading.hashes))


def _cached(path: Path, files: list[python_docs.SourceFile]) -> list[TextRow] | None:
    """The rows kept at `path`, if every file they came from still has the same content."""
    if not path.exists():
        return None
    paths = {file.module: file.path for file in files}
    hashes: dict[str, str] = json.loads((path / "hashes.json").read_text())
    if any(python_docs.content_hash(paths[module].read_bytes()) != kept for module, kept in hashes.items()):
        return None
    return [TextRow(**row) for row in pq.read_table(path / "rows.parquet").to_pylist()]


# ---- files


def _open_files(config: CorpusConfig, wanted: _Labels) -> Corpus:
    sources: dict[Split, tuple[str | None, str]] = {
        "train": (config.source, "corpus.source"),
        "validation": (config.validation_source, "corpus.validation_source"),
        "test": (config.test_source, "corpus.test_source"),
    }
    paths = {split: expand(pattern, key) for split, (pattern, key) in sources.items() if pattern}
    _check_disjoint(paths)
    last = [BadRows(config.max_bad_rows)]  # of the pass before
    first_number, first = _first_record(paths["train"], last[0])
    columns, notes = _choose_columns(config, first, f"{paths['train'][0]}:{first_number}", wanted)

    def rows() -> Iterator[TextRow]:
        bad = last[0] = BadRows(config.max_bad_rows)
        for split, group in paths.items():
            records = ((f"{path}:{n}", record) for path in group for n, record in read_records(path, bad))
            yield from _to_rows(records, columns, config, None if split == "train" else split, bad)

    hashed = _hash_files(paths, [columns, config.model_dump(mode="json")])
    return Corpus(rows, hashed, notes, left_out=lambda: last[0].notes())


def _check_disjoint(paths: dict[Split, list[Path]]) -> None:
    """Raise DataError where a file would be in two splits."""
    for (_, first), (split, second) in combinations(paths.items(), 2):
        both = {path.resolve() for path in first} & {path.resolve() for path in second}
        if both:
            raise DataError(
                f"corpus.{split}_source: expected files of its own, but {min(both)} is in another split too: "
                f"name the files apart"
            )


def _first_record(paths: list[Path], bad: BadRows) -> tuple[int, dict[str, Any]]:
    for path in paths:
        for record in read_records(path, bad):
            return record
    raise DataError(f"{paths[0]}: expected at least one row, found none: the corpus is empty")


def _hash_files(paths: dict[Split, list[Path]], settings: Any) -> str:
    """16 hex digits over the settings, and over which bytes are in which file of which split."""
    sizes = {split: [path.stat().st_size for path in group] for split, group in paths.items()}
    state = blake2b(json.dumps([settings, sizes], sort_keys=True, default=str).encode(), digest_size=8)
    for path in chain.from_iterable(paths.values()):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                state.update(chunk)
    return state.hexdigest()


# ---- hub


def _open_hub(config: CorpusConfig, wanted: _Labels) -> Corpus:
    loaded = _load_hub(config)
    columns, notes = _choose_columns(config, loaded["train"][0], f"{config.source}[train]", wanted)
    kind = loaded["train"].features.get(columns.label) if columns.label else None
    if not wanted.numbers and hasattr(kind, "int2str"):  # a ClassLabel
        columns = replace(columns, no_label=-1)
    parts, split_notes = _hub_splits(loaded, columns)
    shares = {f"{split}_share": 0.0 for split in ("validation", "test") if split in loaded}
    shared = config.model_copy(update=shares)  # a split of its own needs no share of the training rows

    def rows() -> Iterator[TextRow]:
        bad = last[0] = BadRows(config.max_bad_rows)
        for split, part in parts.items():
            records = ((f"{config.source}[{split}]:{n}", row) for n, row in enumerate(part, 1))
            yield from _to_rows(records, columns, shared, None if split == "train" else split, bad)

    last = [BadRows(config.max_bad_rows)]  # of the pass before
    fingerprints = {split: part._fingerprint for split, part in parts.items()}
    hashed = digest([fingerprints, columns, config.model_dump(mode="json")])
    return Corpus(rows, hashed, notes + split_notes, left_out=lambda: last[0].notes())


def _load_hub(config: CorpusConfig) -> Any:
    """A `datasets.DatasetDict` with rows to train on."""
    import datasets  # seconds to import, and only needed here

    try:
        loaded = datasets.load_dataset(config.source, config.hub_config)
    except Exception as error:  # the hub client raises dozens of kinds: every one means "cannot be had"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"corpus.source: expected python-docs, a file, a glob or the name of a hub data set, got "
            f"{config.source!r}, which the hub client cannot load: {reason}"
        ) from error
    if not len(loaded.get("train", ())):
        raise DataError(f"{config.source}: expected rows in a split named train, found {dict(loaded.num_rows)}")
    return loaded


def _hub_splits(loaded: Any, columns: Columns) -> tuple[dict[Split, Any], tuple[str, ...]]:
    """What each split is made of, and what to say of it. GLUE keeps the labels of its test splits to itself."""
    parts: dict[Split, Any] = {split: loaded[split] for split in SPLITS if split in loaded}
    others = sorted(set(loaded) - set(parts))
    notes: tuple[str, ...] = (f"splits left out: {', '.join(others)}",) if others else ()
    hidden = columns.label is not None and (columns.numbers or columns.no_label is not None) and "test" in parts
    withheld = hidden and set(parts["test"].unique(columns.label)) == {-1}
    if withheld and "validation" in parts:
        parts["test"] = parts.pop("validation")
        notes += ("the test split has no labels: the validation split is scored in its place",)
    return parts, notes


# ---- columns and rows


def _choose_columns(
    config: CorpusConfig, first: dict[str, Any], where: str, wanted: _Labels
) -> tuple[Columns, tuple[str, ...]]:
    """The configured columns, else guessed ones with a note for each guess."""
    text, text_note = _choose(config.text_column, TEXT_COLUMNS, first, where, "text")
    label, label_note = _choose_label(config, first, where, wanted)
    absent = _known(wanted) if wanted.any and label is None else ()
    notes = tuple(note for note in (text_note, label_note) if note)
    return Columns(text, label, numbers=wanted.numbers, absent=absent), notes


def _choose_label(
    config: CorpusConfig, first: dict[str, Any], where: str, wanted: _Labels
) -> tuple[str | None, str | None]:
    known = _known(wanted)
    if not wanted.any:
        return None, None
    if not wanted.needed and config.label_column is None and not any(name in first for name in known):
        return None, "no label column: the teacher alone labels the texts (corpus.label_column names one)"
    return _choose(config.label_column, known, first, where, "label")


def _known(wanted: _Labels) -> tuple[str, ...]:
    return NUMBER_COLUMNS if wanted.numbers else LABEL_COLUMNS


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


def _to_rows(
    records: Iterator[tuple[str, dict[str, Any]]],
    columns: Columns,
    config: CorpusConfig,
    split: Split | None,
    bad: BadRows,
) -> Iterator[TextRow]:
    """Typed rows of the records, as far as the caps want them; `split` None: by a hash of the text."""
    caps = Caps(config)
    for where, record in records:
        if caps.full:
            return
        try:
            text = _text(_cell(record, columns.text, where, "text"), columns.text, where)
            label = _label(record, columns, where)
        except DataError as error:
            bad.add(error)
            continue
        if caps.open(label):
            caps.count(label)
            yield TextRow(text, label, where, split or split_of(text, config))


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
    if columns.numbers:
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
