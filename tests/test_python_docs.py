"""Source python-docs: the docstrings of installed libraries."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import complaint, read, texts

from raydistil.config import CorpusConfig
from raydistil.corpus import open_corpus, python_docs
from raydistil.types import TextRow

Library = Callable[[dict[str, str]], Path]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Makes the installed libraries: module path -> source."""
    root = tmp_path / "site"
    root.mkdir()
    monkeypatch.setattr(python_docs, "_roots", lambda: [root])
    monkeypatch.setenv("RAYDISTIL_CACHE", str(tmp_path / "cache"))

    def make(sources: dict[str, str]) -> Path:
        for name, source in sources.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(source)
        return root

    return make


def documented(*texts: str) -> str:
    """A module with one function for each docstring."""
    return "\n".join(f'def f{n}():\n    """{text}"""' for n, text in enumerate(texts))


def sentence(number: int) -> str:
    """Distinct English with no digits."""
    return "This is the word " + " ".join("abcdefghij"[int(digit)] * 3 for digit in str(number)) + " of that list."


def many(modules: int, each: int = 3) -> dict[str, str]:
    """Two libraries of `modules` modules in all, every docstring distinct."""
    return {
        f"{('lib_a', 'lib_b')[m % 2]}/m{m}.py": documented(*(sentence(m * each + n) for n in range(each)))
        for m in range(modules)
    } | {"lib_a/__init__.py": "", "lib_b/__init__.py": ""}


def docs(**keys: Any) -> list[TextRow]:
    return read("python-docs", "classes", **keys)


SAMPLE = '''
"""The docstring of the module, in a few words."""

class Thing:
    """The docstring of a class, in a few words."""

    async def act(self):
        """The docstring of a method, in a few words."""
        def inner():
            """The docstring of an inner function, in a few words."""

if True:
    def late():
        """The docstring of a function in a branch, in words."""
'''


def test_rows_are_labelled_by_library_and_named_by_place(library: Library) -> None:
    library(
        {"pkg/__init__.py": "", "pkg/sub/mod.py": SAMPLE, "single.py": documented("The only text of a lone module.")}
    )
    found = {row.source: (row.label, row.text) for row in docs()}
    assert set(found) == {
        "pkg.sub.mod:module", "pkg.sub.mod:Thing", "pkg.sub.mod:Thing.act", "pkg.sub.mod:Thing.act.inner",
        "pkg.sub.mod:late", "single:f0",
    }  # fmt: skip
    assert found["pkg.sub.mod:Thing"] == ("pkg", "The docstring of a class, in a few words.")
    assert found["single:f0"] == ("single", "The only text of a lone module.")


def test_what_is_not_english_text_is_left_out(library: Library) -> None:
    library({
        "pkg/__init__.py": documented(
            "Cette fonction rend la valeur du champ choisi",
            "Too short, this is.",
            "Это строка документации to the function, and that is all of it",
            "Half a character \\ud800 in the middle of the text, and that is no text.",
            "This one is in English and so it is kept.",
        ),
        "pkg/broken.py": "def f(:\n",
        "pkg/deep.py": '"""The text of a file that is too deep for Python to read."""\nx = ' + "-" * 100_000 + "1",
        "pkg/null.py": '"""The text of a file that holds a null byte."""\0',
        "pkg/tests/test_x.py": documented("The docstring of a test is not that of the library."),
    })  # fmt: skip
    assert texts(docs()) == ["This one is in English and so it is kept."]


def test_a_link_to_nowhere_is_no_file(library: Library) -> None:
    root = library({"pkg/__init__.py": documented("The one text that is in this library.")})
    (root / "pkg" / "lost.py").symlink_to(root / "nowhere.py")
    assert len(docs()) == 1


def test_rows_are_the_same_twice_and_from_the_cache(library: Library, tmp_path: Path) -> None:
    library(many(12))
    first = open_corpus(CorpusConfig(source="python-docs"), "classes")
    kept = list((tmp_path / "cache" / "corpus").iterdir())
    second = open_corpus(CorpusConfig(source="python-docs"), "classes")
    assert len(kept) == 1
    assert list(first.rows()) == list(second.rows()) == list(first.rows())
    assert first.fingerprint == second.fingerprint
    assert len(list(first.rows())) == 36


def test_rows_do_not_depend_on_the_processes(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    library(many(6))
    config = CorpusConfig(source="python-docs", max_rows_per_label=7)
    here = python_docs.read(config, python_docs.list_files(()))
    monkeypatch.setattr(python_docs, "FEW", 0)
    monkeypatch.setattr(python_docs, "CHUNK", 1)
    for processes in (1, 2):
        monkeypatch.setattr(python_docs, "cpu_count", lambda number=processes: number)
        assert python_docs.read(config, python_docs.list_files(())) == here
    assert len(here.rows) == 14


def test_near_twins_are_kept_once(library: Library) -> None:
    library({
        "pkg/__init__.py": documented("Return the value of x, or 1 if it is not set.", "A text of its own is in here."),
        "pkg/twin.py": documented("return the value of X or 22 if it is not set"),
    })  # fmt: skip
    assert len(docs()) == 2


@given(st.lists(st.sampled_from(["the", "value", "of", "it"]), min_size=1, max_size=5), st.data())
def test_twins_differ_in_case_digits_space_and_punctuation_only(words: list[str], data: st.DataObject) -> None:
    gap = st.sampled_from([" ", "\n", ", ", " - ", " 12 ", ". "])
    twin = data.draw(st.sampled_from(["", "(", "1. "]))
    for word in words:
        twin += data.draw(st.sampled_from([word, word.upper(), word.title()])) + data.draw(gap)
    assert python_docs._fingerprint(twin) == python_docs._fingerprint(" ".join(words))
    assert python_docs._fingerprint(twin + "else") != python_docs._fingerprint(" ".join(words))


def test_no_module_is_in_two_splits(library: Library) -> None:
    library(many(60, each=2))
    splits: dict[str, set[str]] = {}
    for row in docs(validation_share=0.3, test_share=0.3):
        splits.setdefault(row.source.partition(":")[0], set()).add(row.split)
    assert len(splits) == 60
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == {"train", "validation", "test"}


def test_caps_and_how_much_is_read_for_them(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    library(many(20))
    assert Counter(row.label for row in docs(max_rows_per_label=5)) == {"lib_a": 5, "lib_b": 5}
    per_module = Counter(row.source.partition(":")[0] for row in docs(max_rows_per_module=2))
    assert set(per_module.values()) == {2}
    monkeypatch.setattr(python_docs, "WAVE", 4)
    files = python_docs.list_files(())
    reading = python_docs.read(CorpusConfig(source="python-docs", max_rows=5), files)
    assert len(reading.rows) == 5
    assert list(reading.hashes) == [file.module for file in files[:4]]
    reading = python_docs.read(CorpusConfig(source="python-docs", libraries=("lib_a",), max_rows_per_label=1), files)
    assert len(reading.hashes) < len(files)


def test_only_the_libraries_asked_for(library: Library) -> None:
    library(many(4))
    assert {row.label for row in docs(libraries=("lib_b",))} == {"lib_b"}
    assert complaint("python-docs", libraries=("lib_b", "lib_z")) == (
        "corpus.libraries: 'lib_z' is not installed here: install it or leave it out"
    )


def test_the_cache_is_left_when_a_file_changes(library: Library) -> None:
    root = library(many(6))
    config = CorpusConfig(source="python-docs")
    before = open_corpus(config, "classes")
    changed = root / "lib_a" / "m0.py"
    changed.write_text(changed.read_text().replace("list", "tree"))
    after = open_corpus(config, "classes")
    assert after.fingerprint != before.fingerprint
    assert sum("tree" in row.text for row in after.rows()) == 3


def test_the_cache_stays_when_a_file_changes_that_was_not_needed(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = library(many(20))
    monkeypatch.setattr(python_docs, "WAVE", 4)
    config = CorpusConfig(source="python-docs", max_rows=5)
    before = open_corpus(config, "classes").fingerprint
    (kept,) = (tmp_path / "cache" / "corpus").iterdir()
    written = (kept / "rows.parquet").stat().st_mtime_ns
    last = root / (python_docs.list_files(())[-1].module.replace(".", "/") + ".py")
    last.write_text(last.read_text().replace("list", "tree"))
    assert open_corpus(config, "classes").fingerprint == before
    assert (kept / "rows.parquet").stat().st_mtime_ns == written


def test_the_standard_library_is_there() -> None:
    files = python_docs.list_files(("json",))
    assert {file.module for file in files} >= {"json", "json.decoder"}
    (decoder,) = (file for file in files if file.module == "json.decoder")
    found = dict(python_docs.parse(decoder.path).texts)
    assert re.match(r"Decode a JSON document from", found["JSONDecoder.raw_decode"])
