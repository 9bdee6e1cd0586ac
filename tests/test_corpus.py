"""Sources -> rows: files and hub data sets; columns, caps and splits."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import complaint, fingerprint, jsonl, read, texts

from raydistil.config import CorpusConfig
from raydistil.corpus import open_corpus
from raydistil.corpus.split import split_of, with_shared_label
from raydistil.errors import ConfigError, DataError
from raydistil.types import TextRow

# ---- files


def test_jsonl_rows_have_text_label_and_place(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "one", "label": "a"}\n\n{"text": "two", "label": 2}\n')
    rows = read(path, "classes", validation_share=0, test_share=0)
    assert rows == [TextRow("one", "a", f"{path}:1", "train"), TextRow("two", "2", f"{path}:3", "train")]
    assert [row.label for row in read(path)] == [None, None]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"body": "b"}', "expected the text column 'text', found body: mend the row or name another"),
        (b'{"text": 5}', "expected text in column 'text', got int: mend the row"),
        (b'{"text": "half \\ud800"}', "half a surrogate pair in column 'text' is no text"),
        (b"{text: 1}", "expected one JSON object a line, got '{text: 1}'"),
        (b'["text"]', "expected a JSON object, got list"),
        (b"[" * 5000, "expected one JSON object a line, got '[[[["),
        (b'{"text": ' + b"1" * 5000 + b"}", "expected one JSON object a line"),
        (b'{"text": "caf\xe9"}', "expected UTF-8 text, got byte 0xe9 at column 14: convert the file"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path: Path, line: bytes, expected: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    message = complaint(path)
    assert message.startswith(f"{path}:2: {expected}")


def test_numbers_of_a_column_that_lacks_some_are_classes(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": [1.0, None, float("nan")]}), path)
    assert [row.label for row in read(path, "classes")] == ["1", None, None]


@pytest.mark.parametrize("value", [1.5, ["a"], {}])
def test_a_label_is_text_or_a_whole_number(tmp_path: Path, value: Any) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"text": "one", "label": "a"}, {"text": "two", "label": value})
    expected = f"{path}:2: expected a class as text or whole number, or null, got {value!r}: mend the row"
    assert complaint(path, "classes") == expected


def test_a_row_may_lack_its_label(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"text": "one", "label": None}, {"text": "two", "label": ""})
    table = tmp_path / "x.csv"
    table.write_text("text,label\none,\ntwo,\n")
    for source in (path, table):
        assert [row.label for row in read(source, "classes")] == [None, None]


def test_csv_keeps_newlines_in_quotes_and_numbers_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('\ntext,label\n"one\ntwo",a\n\n"say ""hi"", you",b\n')
    rows = read(path, "classes")
    assert [(row.text, row.label, row.source) for row in rows] == [
        ("one\ntwo", "a", f"{path}:3"),
        ('say "hi", you', "b", f"{path}:6"),
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("one,a\ntwo\n", ":3: expected 2 columns as in the header, got 1"),
        ("one,a\ntwo,b,c\n", ":3: expected 2 columns as in the header, got 3"),
        ('"one\nrest",a\ntwo\n', ":4: expected 2 columns as in the header, got 1"),
        ('one,a\ntwo,"b\nthree,c\n', ":3: expected a row of CSV, got a bad one: unexpected end of data"),
        (f"{'x' * 5_000_000},a\n", ":2: expected a row of CSV, got a bad one: field larger than field limit"),
        ("one\rtwo,a\n", ":2: expected a row of CSV, got a bad one: new-line character"),
    ],
)
def test_a_bad_row_of_csv_is_named(tmp_path: Path, rows: str, expected: str) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"text,label\n" + rows.encode())
    assert complaint(path).startswith(f"{path}{expected}")


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    content = {"x.csv": "text\nfirst\n", "x.jsonl": '{"text": "first"}\n', "x.txt": "first\n"}[name]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert texts(read(tmp_path / name)) == ["first"]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbfab\xe9\n")
    assert complaint(tmp_path / name).startswith(f"{tmp_path / name}:1: expected UTF-8 text, got byte 0xe9 at column 3")


def test_parquet_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(2500)], "label": list(range(2500))}), path)
    rows = read(path, "classes")
    assert [(row.text, row.label, row.source) for row in rows] == [
        (f"text {n}", str(n), f"{path}:{n + 1}") for n in range(2500)
    ]


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no parquet at all, but long enough")
    assert complaint(tmp_path / "x.parquet").startswith(f"{tmp_path / 'x.parquet'}: not a readable Parquet file")


def test_txt_is_one_text_a_line(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("one\r\n\n  \ntwo\u2028still two\n".encode())
    assert texts(read(tmp_path / "x.txt")) == ["one", "two\u2028still two"]


def test_a_glob_reads_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        (tmp_path / name).write_text(name)
    assert texts(read(tmp_path / "*.txt")) == ["a.txt", "b.txt"]
    assert texts(read(tmp_path / "**" / "*.txt")) == ["a.txt", "b.txt", "deep/c.txt"]


def test_a_file_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    (tmp_path / "part[1].txt").write_text("one")
    assert texts(read(tmp_path / "part[1].txt")) == ["one"]


def test_a_missing_file_an_empty_one_and_one_of_no_known_kind(tmp_path: Path) -> None:
    expected = f"corpus.source: expected a file or a glob that matches some, found nothing at {tmp_path}/none.jsonl"
    assert complaint(tmp_path / "none.jsonl") == expected
    (tmp_path / "data.xml").write_text("<a/>")
    message = complaint(tmp_path / "data.xml")
    assert message == f"corpus.source: {tmp_path}/data.xml is of no known kind: use .csv, .jsonl, .parquet, .txt"
    (tmp_path / "x.jsonl").write_text("\n")
    assert complaint(tmp_path / "x.jsonl").endswith("expected at least one row, found none: the corpus is empty")
    good = jsonl(tmp_path / "good.jsonl", {"text": "a"})
    message = complaint(good, test_source=str(tmp_path / "none.csv"))
    assert message.startswith("corpus.test_source: expected a file")


# ---- columns


def test_guessed_columns_are_noted_and_named_ones_are_not(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"title": "t", "review": "good", "category": "a"})
    corpus = open_corpus(CorpusConfig(source=str(path)), "classes")
    assert corpus.notes == (
        "text column guessed: 'review' (corpus.text_column names another)",
        "label column guessed: 'category' (corpus.label_column names another)",
    )
    named = CorpusConfig(source=str(path), text_column="title", label_column="review")
    assert open_corpus(named, "classes").notes == ()
    assert [(row.text, row.label) for row in open_corpus(named, "classes").rows()] == [("t", "good")]


def test_no_column_to_guess_and_a_named_one_that_is_not_there(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"title": "t", "stars": 5})
    assert complaint(path).startswith(f"{path}:1: expected a text column (text, sentence, ")
    assert complaint(path).endswith("found title, stars: name it with corpus.text_column")
    assert "name it with corpus.label_column" in complaint(path, "classes", text_column="title")
    assert complaint(path, text_column="body").startswith(f"{path}:1: expected the text column 'body', found title")


# ---- caps, splits and the labelled share


@given(share=st.floats(0, 1), seed=st.integers(0, 9))
def test_only_training_rows_lose_their_label_and_a_larger_share_keeps_them(share: float, seed: int) -> None:
    row = TextRow(f"text {seed}", "a", "made", "train")
    kept = with_shared_label(row, share)
    assert with_shared_label(kept, 1.0) == kept
    assert kept.label is None or with_shared_label(row, min(1.0, share + 0.1)) == row
    assert with_shared_label(replace(row, split="test"), share).label == "a"


def test_the_labelled_share_is_a_share(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", *({"text": f"t{n}", "label": "ab"[n % 2]} for n in range(2000)))
    every, some = (read(path, "classes", labelled_share=share) for share in (1.0, 0.25))
    assert texts(every) == texts(some)
    train = [row for row in some if row.split == "train"]
    labelled = sum(row.label is not None for row in train)
    assert abs(labelled - 0.25 * len(train)) < 4 * (0.25 * 0.75 * len(train)) ** 0.5
    assert all(row.label is not None for row in some if row.split != "train")
    assert fingerprint(path, labelled_share=0.25) != fingerprint(path, labelled_share=0.5) != fingerprint(path)


def test_caps_on_all_rows_and_on_each_label(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", *({"text": f"t{n}", "label": "ab"[n % 2]} for n in range(20)))
    assert texts(read(path, max_rows=3)) == ["t0", "t1", "t2"]
    rows = read(path, "classes", max_rows_per_label=2)
    assert [(row.text, row.label) for row in rows] == [("t0", "a"), ("t1", "b"), ("t2", "a"), ("t3", "b")]
    assert len(read(path, "classes", max_rows_per_label=9, max_rows=4)) == 4


def test_sources_of_their_own_make_their_splits(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", *({"text": f"train {n}"} for n in range(40)))
    held = jsonl(tmp_path / "held.jsonl", *({"text": f"held {n}"} for n in range(5)))
    rows = read(train, test_source=str(held), validation_share=0)
    assert Counter(row.split for row in rows) == {"train": 40, "test": 5}
    rows = read(train, validation_source=str(held), test_share=0)
    assert Counter(row.split for row in rows) == {"train": 40, "validation": 5}
    rows = read(train, test_source=str(held), max_rows=4)
    assert sum(row.split == "test" for row in rows) == 4
    assert len(rows) == 8


def test_a_file_in_two_splits_is_refused(tmp_path: Path) -> None:
    for name in ("train", "test"):
        jsonl(tmp_path / f"{name}.jsonl", {"text": name})
    message = complaint(tmp_path / "*.jsonl", test_source=str(tmp_path / "test.jsonl"))
    assert message.startswith(
        f"corpus.test_source: expected files of its own, but {tmp_path.resolve()}/test.jsonl is in"
    )


def test_files_of_their_own_do_not_go_with_other_sources(tmp_path: Path) -> None:
    held = str(jsonl(tmp_path / "held.jsonl", {"text": "a"}))
    with pytest.raises(ConfigError, match=r"go with files as corpus\.source, got 'python-docs'"):
        read("python-docs", test_source=held)
    with pytest.raises(ConfigError, match=r"go with files as corpus\.source, got 'imdb'"):
        read("imdb", validation_source=held)


def test_a_split_is_a_function_of_the_key_alone() -> None:
    config = CorpusConfig(source="x", validation_share=0.25, test_share=0.5)
    expected = ["validation", "test", "validation", "train", "test", "test"]  # points .69 .48 .64 .99 .38 .43 of 0 to 1
    assert [split_of(key, config) for key in "abcdef"] == expected


def test_the_shares_are_kept() -> None:
    config = CorpusConfig(source="x", validation_share=0.05, test_share=0.15)
    counts = Counter(split_of(f"key {n}", config) for n in range(20_000))
    for split, share in (("validation", 0.05), ("test", 0.15)):
        assert abs(counts[split] - 20_000 * share) < 5 * (20_000 * share * (1 - share)) ** 0.5


@given(st.text(), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_larger_test_share_only_adds_to_the_test_split(key: str, first: float, second: float) -> None:
    small, large = sorted((first, second))
    before = split_of(key, CorpusConfig(source="x", test_share=small))
    after = split_of(key, CorpusConfig(source="x", test_share=large))
    assert after == "test" if before == "test" else True


# ---- fingerprints


def test_the_fingerprint_follows_content_and_settings(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"text": "one"}, {"text": "two"})
    before = fingerprint(path)
    assert fingerprint(path) == before
    assert fingerprint(path, max_rows=1) != before
    jsonl(path, {"text": "one"}, {"text": "too"})
    assert fingerprint(path) != before


def test_the_fingerprint_knows_which_file_holds_a_row(tmp_path: Path) -> None:
    a, b, c = ({"text": text} for text in "abc")
    train, held = jsonl(tmp_path / "train.jsonl", a, b), jsonl(tmp_path / "held.jsonl", c)
    before = fingerprint(train, test_source=str(held))
    jsonl(train, a), jsonl(held, b, c)
    assert fingerprint(train, test_source=str(held)) != before


def test_rows_can_be_read_again(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", *({"text": f"t{n}"} for n in range(9)))
    corpus = open_corpus(CorpusConfig(source=str(path), max_rows=5), "blocks")
    assert list(corpus.rows()) == list(corpus.rows())
    assert len(list(corpus.rows())) == 5


# ---- hub


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub_cache"))


def test_a_hub_name_that_cannot_be_had(hub_cache: None, no_pauses: None) -> None:
    message = complaint("nobody/no-such-data-set")
    assert message.startswith("corpus.source: expected python-docs, a file, a glob or the name of a hub data set, got")
    assert "'nobody/no-such-data-set', which the hub client cannot load: " in message


def test_a_data_set_with_a_test_split_keeps_its_training_rows(tmp_path: Path, hub_cache: None) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder / "train.jsonl", *({"text": f"train {n}", "label": n % 2} for n in range(60)))
    jsonl(folder / "test.jsonl", *({"text": f"test {n}", "label": n % 2} for n in range(5)))
    rows = read(folder, "classes", test_share=0.5, validation_share=0.3)
    assert {row.text for row in rows if row.split == "test"} == {f"test {n}" for n in range(5)}
    assert len(rows) == 65
    assert {row.split for row in rows} == {"train", "validation", "test"}
    assert rows[0].source == f"{folder}[train]:1"
    assert rows[0].label == "0"


def test_minus_1_of_a_named_class_is_no_label(tmp_path: Path, hub_cache: None) -> None:
    import datasets

    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    for split, labels in (("train", [0, -1]), ("test", [-1, -1]), ("validation", [1, 0])):
        rows = {"text": [f"{split} {n}" for n in range(2)], "label": labels}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / f"{split}.parquet")
    opened = open_corpus(CorpusConfig(source=str(tmp_path / "set"), validation_share=0), "classes")
    assert [(row.text, row.label, row.split) for row in opened.rows()] == [
        ("train 0", "0", "train"), ("train 1", None, "train"),
        ("validation 0", "1", "test"), ("validation 1", "0", "test"),
    ]  # fmt: skip
    assert opened.notes[-1] == "the test split has no labels: the validation split is scored in its place"


@pytest.mark.parametrize("numbers", [True, False])
def test_a_data_set_without_labels_is_for_a_teacher_that_needs_none(
    tmp_path: Path, hub_cache: None, numbers: bool
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        jsonl(folder / f"{split}.jsonl", {"text": f"{split} text"})
    config = CorpusConfig(source=str(folder))
    opened = open_corpus(config, "numbers" if numbers else "classes", needed=False)
    assert [(row.text, row.label) for row in opened.rows()] == [
        (f"{split} text", None) for split in ("train", "validation", "test")
    ]
    if not numbers:
        assert "expected a label column" in complaint(folder, "classes")


def test_a_data_set_without_training_rows(tmp_path: Path, hub_cache: None) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder / "test.jsonl", {"text": "a"})
    assert complaint(folder) == f"{folder}: expected rows in a split named train, found {{'test': 1}}"


@pytest.mark.parametrize("label", [1.5, None])
def test_a_label_after_a_first_row_without_one_is_named(tmp_path: Path, label: float | None) -> None:
    """Where a teacher could do without: the others would be left out in silence."""
    path = jsonl(tmp_path / "x.jsonl", {"text": "one"}, {"text": "two", "score": label})
    opened = open_corpus(CorpusConfig(source=str(path)), "numbers", needed=False)
    with pytest.raises(DataError, match=r"x.jsonl:2: expected no label, as in the first row, found the column 'score'"):
        list(opened.rows())
    assert [row.label for row in read(path)] == [None, None]
