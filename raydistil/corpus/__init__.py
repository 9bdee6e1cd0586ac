"""corpus: sources -> rows with a text, a label, an origin and a split.

A corpus is opened once: that settles the columns (guesses are noted, to be printed) and a fingerprint of the content,
so that what is made from it can be reused. Its rows can then be read any number of times, always the same.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydistil.config import CorpusConfig, digest
from raydistil.corpus import docs_content, python_docs
from raydistil.corpus.bad import BadRows
from raydistil.corpus.files import expand, is_file_pattern, read_records
from raydistil.corpus.rows import Columns, choose_columns, to_rows
from raydistil.corpus.split import with_shared_label
from raydistil.errors import ConfigError, DataError
from raydistil.storage import cache_dir, whole_directory
from raydistil.types import SPLITS, Content, Split, TextRow


@dataclass(frozen=True, slots=True)
class Corpus:
    """Rows that can be read again, a fingerprint of their content, and what the user should know of them."""

    rows: Callable[[], Iterator[TextRow]]
    fingerprint: str
    notes: tuple[str, ...]
    left_out: Callable[[], tuple[str, ...]] = tuple  # what to say of bad rows, when all have been read once
    pairs: bool = False  # whether each row has two texts


def open_corpus(config: CorpusConfig, content: Content, needed: bool = True) -> Corpus:
    """The corpus `config` names; `content`: what its rows hold, `needed`: it cannot do without a column of labels.

    Raises DataError, naming file and row, for what cannot be used, ConfigError for keys that do not go together.
    """
    corpus = _open(config, content, needed)
    if config.labelled_share == 1:
        return corpus
    share = config.labelled_share
    return replace(
        corpus,
        rows=lambda: (with_shared_label(row, share) for row in corpus.rows()),
        fingerprint=digest([corpus.fingerprint, share]),
    )


def _open(config: CorpusConfig, content: Content, needed: bool) -> Corpus:
    if config.source != "python-docs" and is_file_pattern(config.source):
        return _open_files(config, content, needed)
    if config.validation_source or config.test_source:
        raise ConfigError(
            f"corpus.validation_source and corpus.test_source go with files as corpus.source, got {config.source!r}: "
            f"leave them out"
        )
    if config.source != "python-docs":
        return _open_hub(config, content, needed)
    if content == "numbers":
        raise ConfigError("corpus.source: python-docs has classes and no numbers: use task classification")
    return _open_python_docs(config, content)


# ---- python-docs


def _open_python_docs(config: CorpusConfig, content: Content) -> Corpus:
    if config.pair_column not in (None, docs_content.REST):
        raise ConfigError(
            f"corpus.pair_column: expected {docs_content.REST} of python-docs, got {config.pair_column!r}: name that"
        )
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
    if config.pair_column is not None:
        return Corpus(lambda: docs_content.pairs(rows), digest([hashed, docs_content.FORMAT, "pairs"]), (), pairs=True)
    return Corpus(lambda: docs_content.of(content, rows), digest([hashed, docs_content.FORMAT, content]), ())


def _cache(path: Path, reading: python_docs.Reading) -> None:
    columns = {name: [getattr(row, name) for row in reading.rows] for name in ("text", "label", "source", "split")}
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


def _open_files(config: CorpusConfig, content: Content, needed: bool) -> Corpus:
    sources: dict[Split, tuple[str | None, str]] = {
        "train": (config.source, "corpus.source"),
        "validation": (config.validation_source, "corpus.validation_source"),
        "test": (config.test_source, "corpus.test_source"),
    }
    paths = {split: expand(pattern, key) for split, (pattern, key) in sources.items() if pattern}
    _check_disjoint(paths)
    last = [BadRows(config.max_bad_rows)]  # of the pass before
    first_number, first = _first_record(paths["train"], last[0])
    columns, notes = choose_columns(config, first, f"{paths['train'][0]}:{first_number}", content, needed)

    def rows() -> Iterator[TextRow]:
        bad = last[0] = BadRows(config.max_bad_rows)
        for split, group in paths.items():
            records = ((f"{path}:{n}", record) for path in group for n, record in read_records(path, bad))
            yield from to_rows(records, columns, config, None if split == "train" else split, bad)

    hashed = _hash_files(paths, [columns, config.model_dump(mode="json")])
    return Corpus(rows, hashed, notes, left_out=lambda: last[0].notes(), pairs=columns.pair is not None)


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


def _open_hub(config: CorpusConfig, content: Content, needed: bool) -> Corpus:
    loaded = _load_hub(config)
    columns, notes = choose_columns(config, loaded["train"][0], f"{config.source}[train]", content, needed)
    kind = loaded["train"].features.get(columns.label) if columns.label else None
    if content == "classes" and hasattr(kind, "int2str"):  # a ClassLabel
        columns = replace(columns, no_label=-1)
    if content == "tags":
        columns = replace(columns, names=tuple(getattr(getattr(kind, "feature", None), "names", ())))
    parts, split_notes = _hub_splits(loaded, columns)
    shares = {f"{split}_share": 0.0 for split in ("validation", "test") if split in loaded}
    shared = config.model_copy(update=shares)  # a split of its own needs no share of the training rows

    def rows() -> Iterator[TextRow]:
        bad = last[0] = BadRows(config.max_bad_rows)
        for split, part in parts.items():
            records = ((f"{config.source}[{split}]:{n}", row) for n, row in enumerate(part, 1))
            yield from to_rows(records, columns, shared, None if split == "train" else split, bad)

    last = [BadRows(config.max_bad_rows)]  # of the pass before
    fingerprints = {split: part._fingerprint for split, part in parts.items()}
    hashed = digest([fingerprints, columns, config.model_dump(mode="json")])
    return Corpus(rows, hashed, notes + split_notes, left_out=lambda: last[0].notes(), pairs=columns.pair is not None)


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
    numbered = columns.content == "numbers" or columns.no_label is not None
    hidden = columns.label is not None and numbered and "test" in parts
    withheld = hidden and set(parts["test"].unique(columns.label)) == {-1}
    if withheld and "validation" in parts:
        parts["test"] = parts.pop("validation")
        notes += ("the test split has no labels: the validation split is scored in its place",)
    return parts, notes
