"""Documents in packed blocks: what is stored of them, which token follows which, and which places are compared."""

from pathlib import Path

import decoders
import numpy as np
import pytest
import tiny
from conftest import sentences, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from raydistil.config import TokensConfig, digest
from raydistil.config.loss import LossConfig
from raydistil.corpus import Corpus
from raydistil.documents import next_tokens, positions_of
from raydistil.errors import ModelError
from raydistil.manifest import Manifest
from raydistil.places import compared_places
from raydistil.source import MicroBatches
from raydistil.specs import SourceSpec
from raydistil.tokens import TokenStore, build_store
from raydistil.types import IGNORE, Content, TextRow, TokenBatch

X = IGNORE
Rows = list[tuple[list[int], list[int]]]  # (real tokens, 1 where a document begins)

KINDS: tuple[Content, ...] = ("blocks", "documents")


def corpus(texts: list[str]) -> Corpus:
    rows = [TextRow(text, None, "made", "train") for text in texts]
    return Corpus(lambda: iter(rows), digest(texts), ())


def stored(texts: list[str], length: int, with_bos: bool) -> tuple[TokenStore, Rows]:
    config = TokensConfig(length=length)
    store = TokenStore(build_store(corpus(texts), decoders.tokenizer(with_bos), config, "documents"))
    (count,) = store.bucket_rows("train")
    ids, lengths, _ = store.read("train", 0, np.arange(count))
    starts = store.extra("train", 0, np.arange(count), "starts")
    assert all(row[real:].all() for row, real in zip(starts, lengths, strict=True))
    return store, [(i[:n].tolist(), s[:n].tolist()) for i, s, n in zip(ids, starts, lengths, strict=True)]


# ---- blocks


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("abc d", max_size=30), max_size=8), st.integers(8, 20), st.booleans())
def test_blocks_hold_every_document_once_and_say_where_it_begins(texts: list[str], length: int, bos: bool) -> None:
    texts = ["first", *texts]
    tokenizer = decoders.tokenizer(bos)
    store, rows = stored(texts, length, bos)
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    documents = [[*([0] if bos else []), *ids, tokenizer.eos_token_id] for ids in plain if ids]
    assert [token for ids, _ in rows for token in ids] == [token for document in documents for token in document]
    assert all(len(ids) == length for ids, _ in rows[:-1])
    begun = np.concatenate([[1] + [0] * (len(document) - 1) for document in documents])
    for number, (_, starts) in enumerate(rows):
        expected = begun[number * length : (number + 1) * length].copy()
        expected[0] = 1  # a document that was cut goes on as another
        assert starts == expected.tolist()
    assert store.meta.splits["train"].tokens == len(begun)


def test_a_block_by_hand() -> None:
    """`a b eos c eos` and the first half of the next; the rest of it begins the next block."""
    ids = {word: decoders.tokenizer().convert_tokens_to_ids(word) for word in ("a", "b", "c", decoders.EOS)}
    _, rows = stored(["ab", "c", "abcab"], 8, False)
    letters = [[next(word[0] for word, n in ids.items() if n == token) for token in block] for block, _ in rows]
    assert ["".join(block) for block in letters] == ["ab<c<abc", "ab<"]
    assert [starts for _, starts in rows] == [[1, 0, 0, 1, 0, 1, 0, 0], [1, 0, 0]]


def test_stores_of_both_kinds_lie_apart() -> None:
    texts, tokenizer = corpus(["aa ae"]), tiny.tokenizer()
    tokenizer.eos_token = "[SEP]"
    blocks, documents = (build_store(texts, tokenizer, TokensConfig(length=8), kind) for kind in KINDS)
    assert blocks != documents
    assert tuple(TokenStore(path).meta.content for path in (blocks, documents)) == KINDS


def test_an_encoders_tokenizer_has_no_end() -> None:
    with pytest.raises(ModelError, match="expected a decoder's tokenizer, with an eos token"):
        build_store(corpus(["aa"]), tiny.tokenizer(), TokensConfig(length=8), "documents")


# ---- positions and labels


def test_positions_and_next_tokens_by_hand() -> None:
    starts = np.array([[1, 0, 0, 1, 0, 1], [1, 0, 1, 1, 1, 1]], np.uint8)  # the second row: three real tokens
    positions = positions_of(starts)
    assert positions.dtype == np.int32
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0]]
    ids = np.array([[10, 11, 12, 13, 14, 15], [20, 21, 22, 0, 0, 0]], np.int32)
    assert next_tokens(ids, positions).tolist() == [[11, 12, X, 14, X, X], [21, X, X, X, X, X]]


def spec_of(folder: Path, size: int) -> SourceSpec:
    path = write_jsonl(folder / "corpus.jsonl", sentences(60))
    store = decoders.write_store(path, decoders.write_model(folder / "model", "gpt2"))
    return SourceSpec(store, "train", Manifest(TokenStore(store).bucket_rows("train"), 1, size, seed=3), None)


def test_every_token_but_a_documents_last_has_its_successor_as_label(tmp_path: Path) -> None:
    """Found again in the blocks by their ends alone; there are as many labels as tokens less documents."""
    source, end = spec_of(tmp_path, 5), decoders.tokenizer().eos_token_id
    for index in range(source.manifest.num_micro_batches):
        batch = MicroBatches(source).make(index)
        assert batch.labels_B is None
        for ids, labels, length in zip(batch.input_ids_BL, batch.labels_BL, batch.lengths_B, strict=True):
            real = ids[:length].tolist()
            expected = [X if token == end else after for token, after in zip(real, [*real[1:], X], strict=True)]
            assert labels.tolist() == expected + [X] * (len(ids) - length)


def test_past_the_end_of_the_manifest_nothing_is_learned(tmp_path: Path) -> None:
    source = spec_of(tmp_path, 5)
    batch = MicroBatches(source).make(source.manifest.num_micro_batches)
    assert (batch.num_rows, batch.input_ids_BL.shape) == (0, (1, 32))
    assert batch.positions_BL is not None and batch.positions_BL.max() > 0


# ---- places


@pytest.mark.parametrize("task", [1.0, 0.0])
@pytest.mark.parametrize("positions", ["masked", "all", "sample"])
def test_places_without_a_successor_are_never_compared(positions: str, task: float) -> None:
    rng = np.random.default_rng(0)
    starts = (rng.random((3, 200)) < 0.2).astype(np.uint8)
    starts[:, 0] = 1
    lengths = np.array([200, 150, 90], np.int32)
    starts[np.arange(200)[None] >= lengths[:, None]] = 1
    ids, places = rng.integers(0, 9, (3, 200)).astype(np.int32), positions_of(starts)
    batch = TokenBatch(7, ids, lengths, None, next_tokens(ids, places), 3, np.arange(3), places)
    share = {"kd_sample": 0.4} if positions == "sample" else {}
    found = compared_places(batch, LossConfig(task=task, kd_positions=positions, **share), 1)
    labelled = sum(int((row[:n] != X).sum()) for row, n in zip(batch.labels_BL, lengths, strict=True))
    assert (found.labels_N != X).all()
    assert len(found.at_T) == lengths.sum()
    if positions == "sample":
        assert 0.3 < found.kd_N.sum() / labelled < 0.5
        assert len(found.kd_N) == (labelled if task else found.kd_N.sum())
    else:
        assert found.kd_N.all() and len(found.kd_N) == labelled
