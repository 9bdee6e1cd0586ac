"""Rows that cannot be read or used: left out up to a limit, counted and named."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import texts

from raydistil.config import CorpusConfig
from raydistil.corpus import open_corpus
from raydistil.errors import DataError


def notes_of(path: Path, **config: Any) -> tuple[list[str], tuple[str, ...]]:
    """(texts, what is said of what was left out)."""
    corpus = open_corpus(CorpusConfig(source=str(path), **config), "blocks")
    return texts(list(corpus.rows())), corpus.left_out()


def test_bad_rows_are_left_out_counted_and_named_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    good, bad = b'{"text": "good"}\n', [b"{text: 1}\n", b'{"text": "caf\xe9"}\n', b'{"text": 5}\n', b"[]\n"]
    path.write_bytes(b"".join(good + line for line in bad))
    found, said = notes_of(path, max_bad_rows=4)
    assert found == ["good"] * 4
    assert said[0] == "bad rows left out: 4 of at most 4"
    assert [line.split(": ")[0] for line in said[1:4]] == [f"{path}:{number}" for number in (2, 4, 6)]
    assert said[4:] == ("... and 1 more",)
    with pytest.raises(DataError, match=rf"at most 3 bad rows \(corpus.max_bad_rows\), found more; .*{path}:8: "):
        notes_of(path, max_bad_rows=3)


def test_bad_rows_of_csv_take_no_good_ones_with_them(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"text,label\none,a\ntwo\nthr\xe9e,b\none\rtwo,a\nfour,d\n")
    found, said = notes_of(path, max_bad_rows=3)
    assert found == ["one", "four"] and said[0] == "bad rows left out: 3 of at most 3"


def test_a_quote_that_never_ends_takes_its_own_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    rows = [f"text {n},a\n".encode() for n in range(20_000)]  # until the next quote
    rows[1], rows[3] = b"caf\xe9,a\n", b'"he said hello,a\n'
    rows[9_000], rows[19_999] = b'"two\nlines",a\n', b'"end,a\n'
    path.write_bytes(b"text,label\n" + b"".join(rows))
    found, said = notes_of(path, max_bad_rows=3)
    assert len(found) == 19_997 and found[:4] == ["text 0", "text 2", "text 4", "text 5"] and "two\nlines" in found
    assert [line.split(": ")[0] for line in said[1:]] == [f"{path}:{number}" for number in (3, 5, 20_002)]


def test_what_a_bad_row_leaves_behind_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('text,label\none,a\n"first line\nthe "best" one",pos\n"two, three",b\n"four\nfive",b\n')
    found, said = notes_of(path, max_bad_rows=2)
    assert found == ["one", "two, three", "four\nfive"]
    assert [line.split(": ")[0] for line in said[1:]] == [f"{path}:{number}" for number in (3, 4)]


def test_a_long_document_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    document = "a line of it\n" * 20_000 + "the last one"
    path.write_text(f'text,label\n"{document}",a\nshort,b\n')
    assert notes_of(path)[0] == [document, "short"]


def test_a_value_of_parquet_that_python_cannot_have_is_bad_where_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    words = pa.array([b"one", b"caf\xe9", b"three"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, words.buffers())
    far = pa.array([2**40, 0, 0], pa.timestamp("s"))  # in a column that nobody asks for
    pq.write_table(pa.table({"text": text, "when": far}), path)
    with pytest.raises(DataError, match=rf"{path}:2: expected text in column 'text', got UnicodeDecodeError: mend"):
        notes_of(path)
    with pytest.raises(DataError, match=rf"{path}:1: expected text in column 'when', got OverflowError: mend"):
        notes_of(path, text_column="when")
    found, said = notes_of(path, max_bad_rows=1)
    assert found == ["one", "three"] and said[0] == "bad rows left out: 1 of at most 1"


def damaged(path: Path, group: int) -> Path:
    """A Parquet file of three row groups of a thousand, one of which is not what was written."""
    table = pa.table({"text": [f"text {n} {n * n}" for n in range(3000)]})
    pq.write_table(table, path, row_group_size=1000, use_dictionary=False, write_page_checksum=True)
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(group).column(0)
        start, size = column.data_page_offset, column.total_compressed_size
    content = bytearray(path.read_bytes())
    middle = start + size // 4
    content[middle : middle + 64] = b"\xff" * 64
    path.write_bytes(content)
    return path


def test_a_damaged_row_group_is_named_and_takes_no_other_with_it(tmp_path: Path) -> None:
    path = damaged(tmp_path / "x.parquet", 1)
    with pytest.raises(DataError, match=rf"{path}: row group 1 \(rows 1001 to 2000\) is damaged after 0 rows: "):
        notes_of(path)
    found, said = notes_of(path, max_bad_rows=1000)
    assert [text.split()[1] for text in found] == [str(n) for n in (*range(1000), *range(2000, 3000))]
    assert said[0] == "bad rows left out: 1,000 of at most 1,000"


def test_a_parquet_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = damaged(tmp_path / "x.parquet", 0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        notes_of(path, max_bad_rows=10_000)
