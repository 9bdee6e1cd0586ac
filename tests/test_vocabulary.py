"""A vocabulary cut down to a corpus: the same pieces, the same numbers at what is kept."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import MINILM, ONE_THREAD, sentences
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    AutoModel,
    BertConfig,
    BertTokenizer,
    MPNetConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from raydistil import config as configuration
from raydistil import pipeline
from raydistil.config import Config
from raydistil.errors import ModelError
from raydistil.models import load_model, load_tokenizer
from raydistil.prepare import prepare
from raydistil.student.vocabulary import Pruned, prune_vocabulary

pytestmark = pytest.mark.usefixtures("one_thread")

LETTERS = tuple("abc") + tuple(f"##{letter}" for letter in "abc")
PIECES = ("ab", "##bc", "##ca", "abc", "cab", "##abca", "cc", "##cc", "bb", "##bb")
WORD = st.text("abc", min_size=1, max_size=8)


def toy(specials: tuple[str, ...] = tiny.SPECIAL, first: int = 1) -> PreTrainedTokenizerBase:
    """Unused pieces come after the `first` special tokens, so that every other id moves."""
    words = (*specials[:first], "[unused0]", "[unused1]", *specials[first:], *LETTERS, *PIECES)
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)})


def counts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> NDArray[np.int64]:
    ids = [number for text in texts for number in tokenizer(text)["input_ids"]]
    return np.bincount(ids, minlength=len(tokenizer))


def pruned(texts: list[str], min_count: int = 1) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Pruned]:
    tokenizer = toy()
    model = tiny.model(BertConfig(**{**tiny.SHAPE, "vocab_size": len(tokenizer), "num_hidden_layers": 1}), "mlm")
    return model, tokenizer, prune_vocabulary(model, tokenizer, counts(tokenizer, texts), min_count)


@settings(max_examples=30)
@given(st.lists(st.lists(WORD, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=6))
def test_texts_that_were_counted_are_cut_as_before(texts: list[str]) -> None:
    _, tokenizer, small = pruned(texts)
    for text in texts:
        assert small.tokenizer.tokenize(text) == tokenizer.tokenize(text)
        new_ids = small.tokenizer(text)["input_ids"]
        assert small.kept_ids_W[new_ids].tolist() == tokenizer(text)["input_ids"]


@settings(max_examples=30)
@given(st.lists(st.lists(WORD, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=6), st.integers(2, 5))
def test_rare_pieces_fall_apart_and_nothing_becomes_unknown(texts: list[str], min_count: int) -> None:
    _, tokenizer, small = pruned(texts, min_count)
    for text in texts:
        pieces = small.tokenizer.tokenize(text)
        assert "[UNK]" not in pieces
        assert "".join(piece.removeprefix("##") for piece in pieces) == text.replace(" ", "")
    used = Counter(piece for text in texts for piece in tokenizer.tokenize(text))
    longer = {piece for piece in small.tokenizer.get_vocab() if len(piece.removeprefix("##")) > 1}
    assert longer - set(tiny.SPECIAL) == {
        piece for piece, count in used.items() if count >= min_count and len(piece.removeprefix("##")) > 1
    }


@settings(max_examples=30)
@given(st.lists(WORD, min_size=1, max_size=4).map(" ".join), st.lists(WORD, min_size=1, max_size=4).map(" ".join))
def test_with_the_whole_alphabet_other_texts_are_spelt(counted: str, other: str) -> None:
    tokenizer = toy()
    model = tiny.model(BertConfig(**{**tiny.SHAPE, "vocab_size": len(tokenizer), "num_hidden_layers": 1}), "mlm")
    small = prune_vocabulary(model, tokenizer, counts(tokenizer, [counted]), whole_alphabet=True)
    assert small.tokenizer.tokenize(counted) == tokenizer.tokenize(counted)
    pieces = small.tokenizer.tokenize(other)
    assert "".join(piece.removeprefix("##") for piece in pieces) == other.replace(" ", "")
    used = {*tokenizer.tokenize(counted), *LETTERS, *tiny.SPECIAL}
    assert set(small.tokenizer.get_vocab()) == used


def test_what_is_kept_and_what_goes() -> None:
    _, tokenizer, small = pruned(["abcca ab"])
    assert tokenizer.tokenize("abcca ab") == ["abc", "##ca", "ab"]
    kept = tokenizer.convert_ids_to_tokens(small.kept_ids_W.tolist())
    assert kept == [*tiny.SPECIAL, *LETTERS, "ab", "##ca", "abc"]
    assert [small.tokenizer.convert_ids_to_tokens(number) for number in range(len(kept))] == kept
    assert len(small.tokenizer) == len(kept) == small.model.config.vocab_size
    assert small.tokenizer("ab")["input_ids"] == [2, kept.index("ab"), 3]
    assert small.tokenizer.mask_token_id == 4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["bert", "mpnet", "electra"])
def test_the_logits_of_the_kept_pieces_are_the_same(family: str, tied: bool) -> None:
    mpnets = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")  # it takes 1 for padding
    tokenizer = toy(mpnets, first=2) if family == "mpnet" else toy()
    shape = {**tiny.SHAPE, "vocab_size": len(tokenizer) + 3, "tie_word_embeddings": tied}  # three rows no piece has
    model = tiny.model(type(tiny.FAMILIES[family])(**shape), "mlm")
    small = prune_vocabulary(model, tokenizer, counts(tokenizer, ["abcca ab", "cab"]))
    assert small.model.config.vocab_size < 24
    before, after = (
        found(torch.tensor([pair("abcca cab")["input_ids"]])).logits
        for found, pair in ((model, tokenizer), (small.model, small.tokenizer))
    )
    assert torch.allclose(before[..., small.kept_ids_W], after, atol=1e-6)
    shared = small.model.get_output_embeddings().weight is small.model.get_input_embeddings().weight
    assert shared == tied


def test_class_logits_are_the_same_and_files_are_whole(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(MINILM)
    model = load_model(MINILM, "classification", ("a", "b")).eval()
    texts = [row["text"] for row in sentences(60)]
    small = prune_vocabulary(model, tokenizer, counts(tokenizer, texts))
    assert len(small.kept_ids_W) < 300
    small.model.save_pretrained(tmp_path)
    small.tokenizer.save_pretrained(tmp_path)
    model_again, tokenizer_again = load_model(str(tmp_path), "classification"), load_tokenizer(str(tmp_path))
    assert model_again.config.pad_token_id == 0
    old, new = (one(texts[:8], padding=True, return_tensors="pt") for one in (tokenizer, tokenizer_again))
    assert small.kept_ids_W[new["input_ids"]].tolist() == old["input_ids"].tolist()
    with torch.no_grad():
        assert torch.allclose(model(**old).logits, model_again.eval()(**new).logits, atol=1e-6)
    assert len(tokenizer) == model.config.vocab_size == 30522


def test_special_ids_of_the_configuration_move_with_their_tokens() -> None:
    tokenizer = toy(specials=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))
    shape = BertConfig(**{**tiny.SHAPE, "vocab_size": len(tokenizer)}, bos_token_id=4, eos_token_id=5)
    small = prune_vocabulary(tiny.model(shape, "mlm"), tokenizer, counts(tokenizer, ["ab"]))
    assert (small.model.config.pad_token_id, small.model.config.bos_token_id, small.model.config.eos_token_id) == (
        0,
        2,
        3,
    )


def test_added_tokens_stay() -> None:
    tokenizer = toy()
    tokenizer.add_tokens(["<code>"])
    model = tiny.model(BertConfig(**{**tiny.SHAPE, "vocab_size": len(tokenizer)}), "mlm")
    small = prune_vocabulary(model, tokenizer, counts(tokenizer, ["ab"]))
    assert small.tokenizer.tokenize("ab <code>") == ["ab", "<code>"]
    assert small.kept_ids_W[small.tokenizer.convert_tokens_to_ids("<code>")] == len(tokenizer) - 1


# ---- what cannot be


def test_a_padding_id_that_positions_are_counted_from_must_not_move() -> None:
    words = ("[unused0]", *tiny.SPECIAL, "a")
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    model = tiny.model(MPNetConfig(**{**tiny.SHAPE, "vocab_size": len(words)}), "mlm")
    with pytest.raises(
        ModelError, match=r"MPNetForMaskedLM counts positions from its id 1, which would become 0: keep"
    ):
        prune_vocabulary(model, tokenizer, counts(tokenizer, ["a"]))


def test_a_tokenizer_with_more_ids_than_the_model_has_rows() -> None:
    tokenizer = toy()
    tokenizer.add_tokens(["<code>"])
    model = tiny.model(BertConfig(**{**tiny.SHAPE, "vocab_size": len(tokenizer) - 1}), "mlm")
    with pytest.raises(ModelError, match=r"expected an embedding for every token, got 23 for .* with the id 23: keep"):
        prune_vocabulary(model, tokenizer, counts(tokenizer, ["ab"]))


# ---- a run in the words of its corpus


def config_of(folder: Path, teacher: str, corpus: Path, **student: Any) -> Config:
    return configuration.config_of({
        "name": "words", "output_dir": str(folder), "task": "classification",
        "corpus": {"source": str(corpus), "test_share": 0.3}, "tokens": {"length": 32, "buckets": [16]},
        "teacher": {"model": teacher}, "cluster": ONE_THREAD,
        "student": {"layers": [0, 2], "vocabulary": "corpus", **student},
        "finetune": {"epochs": 12, "lr": 3e-3, "micro_batch_size": 8},
        "distill": {"epochs": 2, "lr": 3e-3, "micro_batch_size": 8, "general": {"epochs": 0}},
        "evaluate": {"latency_rounds": 3, "latency_length": 16},
    })  # fmt: skip


def test_teacher_store_and_student_share_the_words_of_the_corpus(
    tiny_teacher: str, corpus_file: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    config = config_of(tmp_path, tiny_teacher, corpus_file)
    run = prepare(config, said.append)
    tokenizer, whole = load_tokenizer(run.config.teacher.model), load_tokenizer(tiny_teacher)
    assert len(tokenizer) < len(whole)
    assert f"vocabulary: {len(tokenizer):,} of {len(whole):,} tokens" in said[0]
    assert run.store.meta.vocab_size == len(tokenizer)
    plain = prepare(config_of(tmp_path / "plain", tiny_teacher, corpus_file, vocabulary="whole"), said.append)
    for bucket in range(len(run.store.bucket_rows("train"))):
        ids, plain_ids = (each.store.read("train", bucket, np.arange(5))[0] for each in (run, plain))
        assert tokenizer.batch_decode(ids) == whole.batch_decode(plain_ids)
    assert prepare(config, said.append).config.teacher.model == run.config.teacher.model


@pytest.mark.slow
def test_a_run_in_the_words_of_its_corpus(
    ray_cluster: None, tiny_teacher: str, corpus_file: Path, tmp_path: Path
) -> None:
    report = pipeline.run_all(config_of(tmp_path, tiny_teacher, corpus_file), lambda line: None)
    student, tokenizer = (load(report["student_dir"]) for load in (AutoModel.from_pretrained, load_tokenizer))
    assert student.config.vocab_size == len(tokenizer) < len(load_tokenizer(tiny_teacher))
    assert report["student_score"] > 0.6
    assert report["student_params"] < load_model(tiny_teacher, "classification", ("a", "b", "c")).num_parameters() / 2
