"""The token store: packed blocks and length buckets, written once and read back from the memory map."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from raydistil.config import TokensConfig, digest
from raydistil.corpus import Corpus
from raydistil.errors import DataError, ModelError
from raydistil.tokens import TokenStore, build_store, class_names, files, tokenizer_hash
from raydistil.types import IGNORE, SPLITS, Content, Split, TextRow

FIRST_WORD = len(tiny.SPECIAL)
CONTENTS: tuple[Content, ...] = ("blocks", "classes")
WORD_LISTS = st.lists(st.sampled_from(tiny.WORDS), max_size=30)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny.tokenizer()


def corpus(rows: list[TextRow], notes: tuple[str, ...] = ()) -> Corpus:
    return Corpus(lambda: iter(rows), digest([(row.text, row.label, row.split) for row in rows]), notes)


def row(words: list[str], split: Split = "train", label: str | None = None) -> TextRow:
    return TextRow(" ".join(words), label, "made", split)


def ids_of(words: list[str]) -> list[int]:
    return [FIRST_WORD + tiny.WORDS.index(word) for word in words]


def everything(store: TokenStore, split: Split) -> list[tuple[int, list[int], int]]:
    """(padded length, real tokens, label) of every row of `split`, bucket after bucket; checks the padding."""
    found = []
    for bucket, (length, count) in enumerate(zip(store.lengths(split), store.bucket_rows(split), strict=True)):
        ids, lengths, labels = store.read(split, bucket, np.arange(count))
        assert ids.shape == (count, length)
        assert ids.dtype == lengths.dtype == labels.dtype == np.int32
        for tokens_L, real, label in zip(ids, lengths, labels, strict=True):
            assert (tokens_L[real:] == tiny.PAD).all()
            found.append((length, tokens_L[:real].tolist(), int(label)))
    return found


# ---- packed blocks


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SPLITS), WORD_LISTS), min_size=1, max_size=12), st.integers(8, 20))
def test_packing_loses_no_token_and_pads_only_the_last_block(
    tokenizer: PreTrainedTokenizerBase, texts: list[tuple[Split, list[str]]], length: int
) -> None:
    rows = [row(["aa"]), *(row(words, split) for split, words in texts)]
    store = TokenStore(build_store(corpus(rows), tokenizer, TokensConfig(length=length), "blocks"))
    for split in SPLITS:
        blocks = [block for _, block, _ in everything(store, split)]
        stream = list(chain.from_iterable(ids_of(r.text.split()) for r in rows if r.split == split))
        assert [token for block in blocks for token in block if token >= FIRST_WORD] == stream
        assert all(len(block) == length for block in blocks[:-1])
        assert all(block[0] == tiny.CLS and block[-1] == tiny.SEP for block in blocks)
        assert store.meta.splits[split].padding == sum(length - len(block) for block in blocks)
        assert store.meta.splits[split].tokens == sum(map(len, blocks))


def test_packed_texts_are_parted(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [row(["aa", "ae"]), row(["ai"]), row(["ao", "au", "ba", "be"]), row(["bi"])]
    store = TokenStore(build_store(corpus(rows), tokenizer, TokensConfig(length=8), "blocks"))
    aa = FIRST_WORD
    assert [block for _, block, _ in everything(store, "train")] == [
        [tiny.CLS, aa, aa + 1, tiny.SEP, aa + 2, tiny.SEP, aa + 3, tiny.SEP],
        [tiny.CLS, aa + 4, aa + 5, aa + 6, tiny.SEP, aa + 7, tiny.SEP],
    ]
    assert store.meta.labels == ()


# ---- length buckets


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(WORD_LISTS, st.sampled_from("xyz")), max_size=20))
def test_every_example_is_whole_in_the_smallest_bucket_that_holds_it(
    tokenizer: PreTrainedTokenizerBase, examples: list[tuple[list[str], str]]
) -> None:
    borders = [(["aa"] * count, "y") for count in (6, 7, 14, 15, 22, 23)]
    examples = [(["aa"], "x"), *borders, *examples]
    config = TokensConfig(length=24, buckets=(16, 8))
    rows = [row(words, label=label) for words, label in examples]
    store = TokenStore(build_store(corpus(rows), tokenizer, config, "classes"))
    names = sorted({label for _, label in examples})
    kept = [(ids_of(words)[:22], names.index(label)) for words, label in examples if words]
    smallest = [next(n for n in (8, 16, 24) if n >= len(ids) + 2) for ids, _ in kept]
    expected = [
        (length, [tiny.CLS, *ids, tiny.SEP], label) for length, (ids, label) in zip(smallest, kept, strict=True)
    ]
    assert everything(store, "train") == sorted(expected, key=lambda found: found[0])
    counts = store.meta.splits["train"]
    assert store.meta.labels == tuple(names)
    assert counts.truncated == sum(len(words) > 22 for words, _ in examples)
    assert counts.too_short == sum(not words for words, _ in examples)
    assert (counts.texts, counts.rows) == (len(examples), len(kept))
    assert counts.buckets == {length: smallest.count(length) for length in sorted(set(smallest))}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["b", "a", "b"], ("a", "b")),
    ],
)
def test_class_names_are_sorted_and_numbers_by_value(
    tokenizer: PreTrainedTokenizerBase, labels: list[str], expected: tuple[str, ...]
) -> None:
    rows = [row(["aa"], label=label) for label in labels]
    store = TokenStore(build_store(corpus(rows), tokenizer, TokensConfig(), "classes"))
    assert store.meta.labels == expected
    assert [store.meta.labels[label] for _, _, label in everything(store, "train")] == labels


@settings(max_examples=40, deadline=None)
@given(marks=st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=2, max_size=60))
def test_rows_with_a_label_come_first_in_every_bucket(
    tokenizer: PreTrainedTokenizerBase, marks: list[tuple[int, bool]]
) -> None:
    classes = [row(["aa"], label="x"), row(["ae"], label="y")]
    rows = [row(["ba"] * size, label="x" if has else None) for size, has in marks]
    config = TokensConfig(length=16, buckets=(8,))
    store = TokenStore(build_store(corpus(classes + rows), tokenizer, config, "classes"))
    assert store.meta.labels == ("x", "y")
    assert store.meta.splits["train"].labelled_rows == 2 + sum(has for _, has in marks)
    for bucket, (first, every) in enumerate(
        zip(store.bucket_rows("train", labelled=True), store.bucket_rows("train"), strict=True)
    ):
        _, _, labels = store.read("train", bucket, np.arange(every))
        assert ((labels == IGNORE) == (np.arange(every) >= first)).all()


# ---- what is left out, and what is said of it


def test_what_is_left_out_is_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        row(["aa", "ae"]),
        row(["aa"]),
        row(["aa", "zz", "zz"]),
        row(["aa", "zz", "ae", "zz"]),
        row([]),
        row(["aa", "ae"], "test"),
    ]
    config = TokensConfig(length=8, min_tokens=2, max_unknown_share=0.5)
    store = TokenStore(build_store(corpus(rows, ("a note",)), tokenizer, config, "blocks"))
    counts = store.meta.splits["train"]
    assert (counts.texts, counts.too_short, counts.too_unknown, counts.rows) == (5, 2, 1, 2)
    assert store.meta.splits["test"].rows == 1
    assert store.meta.splits["validation"].rows == 0
    assert store.meta.notes == ("a note",)


def test_the_store_knows_its_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [row(["aa", "aa", "zz"]), row(["ae"], "test")]
    store = TokenStore(build_store(corpus(rows), tokenizer, TokensConfig(length=8), "blocks"))
    meta = store.meta
    assert (meta.vocab_size, meta.pad_id, meta.mask_id) == (len(tokenizer), tiny.PAD, tiny.MASK)
    assert meta.special_ids == (0, 1, 2, 3, 4)
    counts = np.zeros(len(tokenizer), np.int64)
    counts[[tiny.CLS, tiny.SEP, tiny.UNK, FIRST_WORD]] = 1, 1, 1, 2
    assert store.token_counts().tolist() == counts.tolist()


@pytest.mark.parametrize(
    ("labels", "known", "expected"),
    [
        ((None, None), ("bad", "good"), ("bad", "good")),
        (("good", None), ("good", "bad"), ("good", "bad")),
        (("b", "a"), ("good", "bad"), ("a", "b")),
        (("10", "9"), (), ("9", "10")),
    ],
)
def test_classes_are_the_teachers_where_the_rows_have_no_others(
    labels: tuple[str | None, ...], known: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert class_names([row(["aa"], label=label) for label in labels], known) == expected


def test_a_teacher_that_calls_classes_as_the_data_does_shares_the_store(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that fine-tunes one, whichever comes first; other classes, or more of them, make another store."""
    monkeypatch.setenv("RAYDISTIL_CACHE", str(tmp_path))
    texts = corpus([row(["aa"], label="good"), row(["ab"], label="bad")])

    def name(classes: tuple[str, ...]) -> str:
        path = build_store(texts, tokenizer, TokensConfig(), "classes", classes)
        assert TokenStore(path).meta.labels == (classes or ("bad", "good"))
        return path.name

    asked = name(("bad", "good"))
    assert asked == name(()) == name(("bad", "good"))
    assert len({asked, name(("good", "bad")), name(("bad", "fair", "good"))}) == 3


@pytest.mark.parametrize(
    ("rows", "content", "expected"),
    [
        ([], False, "expected texts to train on, found none (0 texts, 0 too short, 0 with too many unknown)"),
        ([row([])], False, "expected texts to train on, found none (1 texts, 1 too short"),
        ([row(["aa"], "test")], "blocks", "expected texts to train on, found none (0 texts"),
        ([], "classes", "expected at least two classes, found no label"),
        ([row(["aa"], label="only")], "classes", "expected at least two classes, found only: check the labels"),
    ],
)
def test_an_empty_corpus_is_an_error_and_leaves_no_store(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[TextRow],
    content: Content, expected: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("RAYDISTIL_CACHE", str(tmp_path))
    with pytest.raises(DataError) as caught:
        build_store(corpus(rows), tokenizer, TokensConfig(), content)
    assert str(caught.value).startswith(expected)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_a_tokenizer_without_cls_and_sep_is_no_encoders(tokenizer: PreTrainedTokenizerBase) -> None:
    bare = tiny.tokenizer()
    bare.cls_token = None
    for content in CONTENTS:
        rows = [row(["aa"], label="x"), row(["ae"], label="y")]
        with pytest.raises(ModelError, match=r"expected an encoder's tokenizer, with \[CLS\] and \[SEP\]"):
            build_store(corpus(rows), bare, TokensConfig(), content)


# ---- reuse


def test_the_same_inputs_give_the_same_store_unwritten(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [row(["ba", "be", "bi"])]
    path = build_store(corpus(rows), tokenizer, TokensConfig(length=10), "blocks")
    before = {file.name: (file.stat().st_mtime_ns, file.stat().st_ino) for file in path.iterdir()}
    assert build_store(corpus(rows), tiny.tokenizer(), TokensConfig(length=10), "blocks") == path
    assert {file.name: (file.stat().st_mtime_ns, file.stat().st_ino) for file in path.iterdir()} == before
    others = {
        build_store(corpus([row(["ba", "be", "bo"])]), tokenizer, TokensConfig(length=10), "blocks"),
        build_store(corpus(rows), tokenizer, TokensConfig(length=11), "blocks"),
        build_store(corpus(rows), tiny.tokenizer(tiny.WORDS[::-1]), TokensConfig(length=10), "blocks"),
    }
    assert len(others - {path}) == 3


def test_a_tokenizer_is_the_same_before_and_after_use(tokenizer: PreTrainedTokenizerBase) -> None:
    fresh = tiny.tokenizer()
    before = tokenizer_hash(fresh)
    fresh(["aa ae", "ai"], padding="max_length", truncation=True, max_length=9)
    assert json.loads(fresh.backend_tokenizer.to_str())["truncation"] is not None
    assert tokenizer_hash(fresh) == before
    assert tokenizer_hash(tiny.tokenizer(tiny.WORDS[::-1])) != before
    assert tokenizer_hash(tiny.tokenizer(tiny.WORDS[:-1])) != before


# ---- reading


@pytest.mark.parametrize("count", [1, 4, 5, 8, 11])
def test_rows_are_read_over_the_borders_of_batches(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setenv("RAYDISTIL_CACHE", str(tmp_path))
    monkeypatch.setattr(files, "ROWS_PER_BATCH", 4)
    words = [tiny.WORDS[: 1 + n % 5] for n in range(count)]
    rows = [row(list(some), "test", "ab"[n % 2]) for n, some in enumerate(words)]
    first = [row(["aa"], label=label) for label in "ab"]
    store = TokenStore(build_store(corpus(first + rows), tokenizer, TokensConfig(length=8), "classes"))
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(count), 2))
    ids, lengths, labels = store.read("test", 0, order)
    for place, number in enumerate(order):
        expected = [tiny.CLS, *ids_of(list(words[number])), tiny.SEP]
        assert ids[place, : lengths[place]].tolist() == expected
        assert labels[place] == number % 2
    assert ids.flags.writeable


def test_no_rows_are_read_as_none(tokenizer: PreTrainedTokenizerBase) -> None:
    store = TokenStore(build_store(corpus([row(["aa"])]), tokenizer, TokensConfig(length=8), "blocks"))
    ids, lengths, labels = store.read("train", 0, np.empty(0, np.int64))
    assert (ids.shape, lengths.shape, labels.shape) == ((0, 8), (0,), (0,))
    assert store.lengths("test") == store.bucket_rows("test") == ()
