"""Rows out of words with classes and of questions with contexts: what stands where, and that nothing is lost."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import MINILM, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from made import TAGS, asked, source, tagged
from rows import complaint, read
from transformers import PreTrainedTokenizerBase

from raydistil.config import TokensConfig, digest
from raydistil.corpus import Corpus, docs_content
from raydistil.errors import ModelError
from raydistil.models import load_tokenizer
from raydistil.packing import joints
from raydistil.source import MicroBatches
from raydistil.tokens import TokenStore, build_store
from raydistil.tokens.examples import Tokens, first_tokens, windows
from raydistil.types import IGNORE, NO_TAG, Answer, TextRow

QUESTION = [90, 91]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(MINILM)


# ---- words


@given(st.lists(st.tuples(st.text("ab", min_size=1, max_size=6), st.integers(1, 3)), max_size=8), st.booleans())
def test_a_word_begins_with_its_first_token(made: list[tuple[str, int]], with_space: bool) -> None:
    """Whether tokens are cut anywhere in a word, and whether the space before a word belongs to its first token."""
    places, firsts, start = [], [], 0
    for word, pieces in made:
        cuts = np.unique(np.linspace(start, start + len(word), pieces + 1).astype(int)).tolist()
        firsts.append(len(places))
        places += list(pairwise(cuts))
        if with_space and start:
            places[firsts[-1]] = (start - 1, places[firsts[-1]][1])
        start += len(word) + 1
    assert first_tokens(tuple(word for word, _ in made), places) == firsts


def test_a_word_without_a_token_is_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [TextRow("a \u200b b", None, "made", "train", ("a", "\u200b", "b"), ("X", "Y", "X"))]
    corpus = Corpus(lambda: iter(rows), digest(["lost"]), ())
    store = TokenStore(build_store(corpus, tokenizer, TokensConfig(length=8), "tags"))
    assert store.extra("train", 0, np.array([0]), "tags").tolist() == [[IGNORE, 0, 0] + [IGNORE] * 5]
    assert store.meta.splits["train"].unplaced == 1


def test_classes_stand_at_first_tokens_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    made = MicroBatches(source(tmp_path, "token_classification"))
    rows = {" ".join(row["tokens"]): row["ner_tags"] for row in tagged(60)}
    unknown = 0
    for index in range(8):
        batch = made.make(index)
        assert batch.tags_BL is not None and batch.labels_BL is None and batch.labels_B is None
        for ids_L, tags_L, length in zip(batch.input_ids_BL, batch.tags_BL, batch.lengths_B, strict=True):
            text = tokenizer.decode(ids_L[1 : length - 1])
            first_L = tags_L != IGNORE
            pieces = tokenizer.convert_ids_to_tokens(ids_L[first_L])
            assert [piece for piece in pieces if piece.startswith("##")] == []
            known = rows.get(text)
            if known is None:
                assert set(tags_L[first_L].tolist()) == {NO_TAG}
                unknown += 1
            else:
                assert [TAGS[tag] for tag in tags_L[first_L]] == known
    assert unknown


def test_words_of_a_tokenizer_without_places(tmp_path: Path) -> None:
    class Slow:
        is_fast, cls_token_id, sep_token_id, unk_token_id, all_special_ids = False, 1, 2, 3, [1, 2, 3]

        def __len__(self) -> int:
            return 9

        def get_vocab(self) -> dict[str, int]:
            return {}

    rows = [TextRow("a b", None, "made", "train", ("a", "b"), ("X", "Y"))]
    with pytest.raises(ModelError, match=r"expected a tokenizer that knows where its tokens stand in a text, Slow is"):
        build_store(Corpus(lambda: iter(rows), "slow", ()), Slow(), TokensConfig(length=8), "tags")  # type: ignore[arg-type]


# ---- questions


@given(
    length=st.integers(20, 40), size=st.integers(0, 120), stride=st.integers(1, 5),
    answer=st.none() | st.tuples(st.integers(0, 119), st.integers(1, 8)),
)  # fmt: skip
def test_windows_lose_no_token_and_share_as_many_as_they_should(
    length: int, size: int, stride: int, answer: tuple[int, int] | None
) -> None:
    context = Tokens(list(range(100, 100 + size)), [(2 * n, 2 * n + 2) for n in range(size)])
    parts = joints(tiny.tokenizer())
    span = None if answer is None or answer[0] + answer[1] > size else answer
    answers = () if span is None else (Answer(2 * span[0], "x" * (2 * span[1])),)
    made = list(windows(QUESTION, context, answers, parts, length, stride, 7))
    room, before = parts.room(QUESTION, length), 4
    inner = [row.ids[before:-1] for row in made]
    assert inner[0] + [token for each in inner[1:] for token in each[stride:]] == context.ids
    assert all(len(row.ids) <= length and row.ids[:before] == [tiny.CLS, *QUESTION, tiny.SEP] for row in made)
    assert all(left[-stride:] == right[:stride] for left, right in pairwise(inner))
    held = 0
    for row, tokens in zip(made, inner, strict=True):
        first, last = row.extras["span"]
        chars = np.array(row.extras["chars"]).reshape(-1, 2)
        assert chars[before:].tolist() == [[2 * (t - 100), 2 * (t - 100) + 2] for t in tokens]
        assert (chars[:before] == -1).all() and row.extras["question"] == [7] and row.extras["context"] == [before]
        if first:
            assert span is not None and [row.ids[first], row.ids[last]] == [100 + span[0], 99 + sum(span)]
            held += 1
        else:
            assert last == 0
    assert bool(held) or span is None or span[1] > min(stride, room)


def test_questions_and_their_contexts_are_stored(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    spec = source(tmp_path, "question_answering", length=32)
    store, rows = TokenStore(spec.store), asked(60)
    questions = {question.context: question for question in store.questions("train")}
    counts = store.meta.splits["train"]
    assert counts.rows > counts.texts == len(questions) and counts.unplaced == 0
    assert counts.labelled_rows < counts.rows
    batch = MicroBatches(spec).make(0)
    assert batch.contexts_B is not None and batch.spans_B2 is not None
    for ids_L, first, (start, end) in zip(batch.input_ids_BL, batch.contexts_B, batch.spans_B2, strict=True):
        question = tokenizer.decode(ids_L[1 : first - 1])
        fitting = [
            row for row in rows if row["question"].replace("?", " ?") == question.replace("?", " ?").replace("  ", " ")
        ]
        assert fitting
        if start > 0:
            said = tokenizer.decode(ids_L[start : end + 1])
            assert said in {row["answers"]["text"][0] for row in fitting if row["answers"]}
    for row in rows:
        if row["context"] in questions:
            known = row["answers"] and row["answers"]["text"]
            assert questions[row["context"]].answers == known


def test_an_answer_that_no_window_holds_is_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    context = " ".join(["word"] * 80)
    rows = [TextRow("what?", None, "made", "train", context=context, answers=(Answer(0, context),))]
    store = TokenStore(
        build_store(Corpus(lambda: iter(rows), digest(["long"]), ()), tokenizer, TokensConfig(length=32), "answers")
    )
    assert store.meta.splits["train"].unplaced == 1


def test_joints_are_the_tokenizers_own(tokenizer: PreTrainedTokenizerBase) -> None:
    parts = joints(tokenizer)
    one, other = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("what is it", "a thing"))
    assert [*parts.first, *one, *parts.middle, *other, *parts.last] == tokenizer("what is it", "a thing")["input_ids"]


# ---- files


def test_words_and_questions_are_read_from_files(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"words": ["a", "b"], "tags": [1, 0]}, {"words": ["c"], "tags": None}])
    first, second = read(path, "tags")
    assert (first.text, first.words, first.tags, second.tags) == ("a b", ("a", "b"), ("1", "0"), None)
    listed = [{"text": "b", "answer_start": 2}]
    rows = [{"query": "q", "passage": "a b", "answers": listed}, {"query": "q", "passage": "a", "answers": []}]
    first, second = read(write_jsonl(tmp_path / "y.jsonl", rows), "answers")
    assert (first.text, first.context, first.answers, second.answers) == ("q", "a b", (Answer(2, "b"),), ())


@pytest.mark.parametrize(
    ("content", "row", "expected"),
    [
        ("tags", {"tokens": "a b", "tags": []}, "expected a list of words in column 'tokens', got 'a b'"),
        ("tags", {"tokens": ["a", " "], "tags": ["O", "O"]}, "expected words in column 'tokens', got an empty one"),
        ("tags", {"tokens": ["a", "b"], "tags": ["O"]}, "expected a class for each of the 2 words in column"),
        ("tags", {"tokens": ["a"], "tags": [1.5]}, "expected classes of words as text or numbers, got 1.5"),
        ("tags", {"text": "a"}, "expected a text column (tokens, words), found text: name it"),
        ("answers", {"question": "q", "answers": []}, "expected a context column (context, passage,"),
        ("answers", {"question": "q", "context": "c", "answers": "c"}, "expected answers as {'text': [...],"),
        (
            "answers", {"question": "q", "context": "a b", "answers": {"text": ["b"], "answer_start": [1]}},
            "expected the answer 'b' at character 1 of the context, found ' ': mend answer_start",
        ),
        (
            "answers", {"question": "q", "context": "a b", "answers": {"text": [""], "answer_start": [1]}},
            "expected an answer with text and answer_start, got (1, '')",
        ),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(tmp_path: Path, content: Any, row: dict[str, Any], expected: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [row])
    assert complaint(path, content).startswith(f"{path}:1: {expected}")


def test_contexts_are_on_one_side_of_a_split(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "context": f"text {n // 5}", "answers": []} for n in range(200)]
    sides: dict[str, set[str]] = {}
    for row in read(write_jsonl(tmp_path / "x.jsonl", rows), "answers", test_share=0.5):
        assert row.context is not None
        sides.setdefault(row.context, set()).add(row.split)
    assert all(len(splits) == 1 for splits in sides.values()) and len(set.union(*sides.values())) > 1


# ---- docstrings

DOCSTRING = """Move it.

Parameters
----------
axis : int, optional
    The way.
*args : float
    More.

Returns
-------
out : array
"""


def test_docstrings_hold_words_with_classes_and_questions() -> None:
    row = TextRow(DOCSTRING, "numpy", "numpy:move", "test")
    (words,) = docs_content.of("tags", [row, TextRow("No parameters.", "numpy", "numpy:other", "train")])
    assert words.tags is not None and words.text == " ".join(words.words)
    named = [(word, tag) for word, tag in zip(words.words, words.tags, strict=True) if tag != "O"]
    assert named == [
        ("axis", "B-PARAM"), ("int", "B-TYPE"), (",", "I-TYPE"), ("optional", "I-TYPE"), ("*", "B-PARAM"),
        ("args", "I-PARAM"), ("float", "B-TYPE"),
    ]  # fmt: skip
    found = list(docs_content.of("answers", [row]))
    assert [(each.text, each.answers) for each in found] == [
        ("What is the type of axis?", (Answer(DOCSTRING.index("int"), "int, optional"),)),
        ("What is the type of *args?", (Answer(DOCSTRING.index("float"), "float"),)),
    ]
    assert {each.split for each in (*found, words)} == {"test"}
