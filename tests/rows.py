"""Reading corpora in tests."""

import json
from pathlib import Path
from typing import Any

import pytest

from raydistil.config import CorpusConfig
from raydistil.corpus import open_corpus
from raydistil.errors import DataError
from raydistil.types import Content, TextRow


def read(source: Path | str, content: Content = "blocks", **keys: Any) -> list[TextRow]:
    return list(open_corpus(CorpusConfig(source=str(source), **keys), content).rows())


def fingerprint(source: Path | str, **keys: Any) -> str:
    return open_corpus(CorpusConfig(source=str(source), **keys), "blocks").fingerprint


def complaint(source: Path | str, content: Content = "blocks", **keys: Any) -> str:
    """What is said of a bad corpus, on its one line."""
    with pytest.raises(DataError) as caught:
        read(source, content, **keys)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(rows: list[TextRow]) -> list[str]:
    return [row.text for row in rows]
