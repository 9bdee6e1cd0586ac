"""corpus: sources -> rows with a text, a label, an origin and a split.

A corpus is opened once: that settles the columns (guesses are noted, to be printed) and a fingerprint of the content,
so that what is made from it can be reused. Its rows can then be read any number of times, always the same.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydistil.config import CorpusConfig, digest
from raydistil.corpus import python_docs
from raydistil.corpus.caps import Caps
from raydistil.corpus.files import expand, is_file_pattern, read_records
from raydistil.corpus.split import split_of
from raydistil.errors import DataError
from raydistil.storage import cache_dir, whole_directory
from raydistil.types import Split, TextRow

TEXT_COLUMNS = ("text", "sentence", "content", "document", "review", "question")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target")


@dataclass(frozen=True, slots=True)
class Corpus:
    """Rows that can be read again, a fingerprint of their content, and what the user should know of them."""

    rows: Callable[[], Iterator[TextRow]]
    fingerprint: str
    notes: tuple[str, ...]


def open_corpus(config: CorpusConfig, labelled: bool) -> Corpus:
    """The corpus `config` names. Raises DataError, naming file and row, for anything that cannot be used."""
    if config.source == "python-docs":
        return _open_python_docs(config)
    if is_file_pattern(config.source):
        return _open_files(config, labelled)
    return _open_hub(config, labelled)


# ---- python-docs


def _open_python_docs(config: CorpusConfig) -> Corpus:
    files = python_docs.list_files(config.libraries)
    shape = [config.model_dump(mode="json"), [(file.module, file.path.stat().st_size) for file in files]]
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


def _open_files(config: CorpusConfig, labelled: bool) -> Corpus:
    sources = {
        "train": (config.source, "corpus.source"),
        "validation": (config.validation_source, "corpus.validation_source"),
        "test": (config.test_source, "corpus.test_source"),
    }
    paths = {split: expand(pattern, key) for split, (pattern, key) in sources.items() if pattern}
    first_number, first = _first_record(paths["train"])
    columns, notes = _choose_columns(config, first, f"{paths['train'][0]}:{first_number}", labelled)

    def rows() -> Iterator[TextRow]:
        caps = Caps(config)
        for split, group in paths.items():
            given = None if split == "train" else split
            records = ((f"{path}:{n}", record) for path in group for n, record in read_records(path))
            yield from _to_rows(records, columns, config, caps, given)  # type: ignore[arg-type]

    every = [path for group in paths.values() for path in group]
    return Corpus(rows, _hash_files(every, [columns, config.model_dump(mode="json")]), notes)


def _first_record(paths: list[Path]) -> tuple[int, dict[str, Any]]:
    for path in paths:
        for record in read_records(path):
            return record
    raise DataError(f"{paths[0]}: expected at least one row, found none: the corpus is empty")


def _hash_files(paths: list[Path], settings: Any) -> str:
    state = blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=8)
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                state.update(chunk)
    return state.hexdigest()


# ---- hub


def _open_hub(config: CorpusConfig, labelled: bool) -> Corpus:
    import datasets  # seconds to import, and only needed here

    try:
        loaded = datasets.load_dataset(config.source, config.hub_config)
    except Exception as error:  # the hub client raises dozens of kinds: every one means "cannot be had"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"corpus.source: expected python-docs, a file, a glob or the name of a hub data set, got "
            f"{config.source!r}, which the hub client cannot load: {reason}"
        ) from error
    train = loaded["train"]
    columns, notes = _choose_columns(config, train[0] if len(train) else {}, f"{config.source}[train]", labelled)

    def rows() -> Iterator[TextRow]:
        caps = Caps(config)
        for split in ("train", "validation", "test"):
            if split in loaded:
                records = ((f"{config.source}[{split}]:{n}", row) for n, row in enumerate(loaded[split], 1))
                yield from _to_rows(records, columns, config, caps, None if split == "train" else split)

    fingerprints = {split: part._fingerprint for split, part in loaded.items()}
    return Corpus(rows, digest([fingerprints, columns, config.model_dump(mode="json")]), notes)


# ---- columns and rows


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns hold the text and, for labelled data, the class."""

    text: str
    label: str | None


def _choose_columns(
    config: CorpusConfig, first: dict[str, Any], where: str, labelled: bool
) -> tuple[Columns, tuple[str, ...]]:
    """The configured columns, else guessed ones with a note for each guess."""
    text, text_note = _choose(config.text_column, TEXT_COLUMNS, first, where, "text")
    label, label_note = _choose(config.label_column, LABEL_COLUMNS, first, where, "label") if labelled else (None, None)
    return Columns(text, label), tuple(note for note in (text_note, label_note) if note)


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
    records: Iterator[tuple[str, dict[str, Any]]], columns: Columns, config: CorpusConfig, caps: Caps,
    split: Split | None,
) -> Iterator[TextRow]:  # fmt: skip
    """Typed rows of the records, as far as the caps want them; `split` None: by a hash of the text."""
    for where, record in records:
        if caps.full:
            return
        text = _cell(record, columns.text, where, "text")
        label = None if columns.label is None else _label(_cell(record, columns.label, where, "label"), where)
        if not isinstance(text, str):
            raise DataError(f"{where}: expected text in column {columns.text!r}, got {type(text).__name__}")
        if caps.open(label):
            caps.count(label)
            yield TextRow(text, label, where, split or split_of(text, config))


def _cell(record: dict[str, Any], column: str, where: str, role: str) -> Any:
    if column not in record:
        raise DataError(
            f"{where}: expected the {role} column {column!r}, found {', '.join(map(str, record)) or 'none'}: "
            f"mend the row or name another with corpus.{role}_column"
        )
    return record[column]


def _label(value: Any, where: str) -> str:
    if isinstance(value, bool | int | str) and value != "":
        return str(value)
    raise DataError(f"{where}: expected a class as text or whole number, got {value!r}: mend the row")
