"""Tokenizers of every kind, cut down to some texts: they cut these as before, and whatever else without an error.

The tokenizers are those of families.py.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import sentences
from families import FRONT, LOSSLESS, MADE, make
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vocabulary import config_of, counts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    ByT5Tokenizer,
    DebertaV2Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)

from raydistil.errors import ModelError
from raydistil.models import load_tokenizer, vocabulary_head
from raydistil.prepare import prepare
from raydistil.student.pieces import content_of, ids_of, kept_ids, renumbered
from raydistil.student.vocabulary import Pruned, prune_vocabulary

pytestmark = pytest.mark.usefixtures("one_thread")

WORD = st.text("abcé", min_size=1, max_size=8)
TEXTS = st.lists(st.lists(WORD, min_size=1, max_size=5).map(" ".join), min_size=1, max_size=5)
ANYTHING = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def pruned(tokenizer: PreTrainedTokenizerBase, texts: list[str], min_count: int = 1) -> Pruned:
    shape = BertConfig(**{**tiny.SHAPE, "vocab_size": len(tokenizer), "num_hidden_layers": 1})
    return prune_vocabulary(tiny.model(shape, "mlm"), tokenizer, counts(tokenizer, texts), min_count)


# ---- laws


@pytest.mark.parametrize("family", MADE)
@settings(max_examples=25)
@given(TEXTS, ANYTHING)
def test_texts_that_were_counted_are_cut_as_before(family: str, texts: list[str], other: str) -> None:
    tokenizer = make(family)
    small = pruned(tokenizer, [*texts, other])
    for text in (*texts, other):
        old, new = (each(text)["input_ids"] for each in (tokenizer, small.tokenizer))
        assert small.kept_ids_W[new].tolist() == old
        assert small.tokenizer.tokenize(text) == tokenizer.tokenize(text)
        assert small.tokenizer.decode(new) == tokenizer.decode(old)


@pytest.mark.parametrize("family", MADE)
@settings(max_examples=25)
@given(TEXTS, ANYTHING, st.integers(1, 4))
def test_any_other_text_is_cut_too(family: str, texts: list[str], other: str, min_count: int) -> None:
    tokenizer = make(family)
    small = pruned(tokenizer, texts, min_count).tokenizer
    ids = small(other, add_special_tokens=False)["input_ids"]
    assert all(0 <= number < len(small) for number in ids)
    if family in LOSSLESS:
        assert small.decode(ids) == tokenizer.decode(tokenizer(other, add_special_tokens=False)["input_ids"])
    for text in texts:  # of rarer pieces at least the characters are there
        assert small.unk_token_id not in small(text)["input_ids"]


@pytest.mark.parametrize("family", MADE)
def test_it_is_smaller_and_its_files_are_whole(family: str, tmp_path: Path) -> None:
    tokenizer, texts = make(family), ["abc cab", "bca"]
    small = pruned(tokenizer, texts)
    assert len(small.tokenizer) == len(small.kept_ids_W) < len(tokenizer) - 40
    assert small.tokenizer.convert_ids_to_tokens(list(range(len(small.kept_ids_W)))) == [
        tokenizer.convert_ids_to_tokens(int(old)) for old in small.kept_ids_W
    ]
    small.tokenizer.save_pretrained(tmp_path)
    again = type(small.tokenizer).from_pretrained(tmp_path)
    assert again(texts)["input_ids"] == small.tokenizer(texts)["input_ids"]
    assert again.special_tokens_map == tokenizer.special_tokens_map


# ---- what stays, by hand


def bpe_content(pieces: str, merges: str, **options: Any) -> dict[str, Any]:
    """`ab c` is the pieces ab and c; `a+b` a merge. A piece that is none of a few letters is a special token."""
    vocab = {piece: number for number, piece in enumerate(pieces.split())}
    pairs: list[Any] = [merge.split("+") for merge in merges.split()]
    return dict(json.loads(Tokenizer(models.BPE(vocab=vocab, merges=list(map(tuple, pairs)), **options)).to_str()))


def small_content(content: dict[str, Any], used: str, min_count: int = 1) -> dict[str, Any]:
    ids = ids_of(content["model"])
    counts_V = np.bincount([ids[piece] for piece in used.split()], minlength=len(ids))
    kept = kept_ids(content, counts_V, min_count)
    return renumbered(content, {int(old): new for new, old in enumerate(kept)})["model"]  # type: ignore[no-any-return]


def test_a_piece_keeps_what_it_is_joined_from_and_no_other_way_to_it() -> None:
    content = bpe_content("ă ĳ ħ ĉ ăĳ ĳħ ăĳħ ħĉ", "ă+ĳ ĳ+ħ ăĳ+ħ ă+ĳħ ħ+ĉ")
    alphabet = ["ă", "ĳ", "ħ", "ĉ"]
    assert set(alphabet) <= set(pre_tokenizers.ByteLevel.alphabet())
    model = small_content(content, "ăĳħ")
    assert list(model["vocab"].items()) == [(piece, n) for n, piece in enumerate([*alphabet, "ăĳ", "ăĳħ"])]
    assert model["merges"] == [["ă", "ĳ"], ["ăĳ", "ħ"]]


def test_of_two_ways_to_a_piece_both_stay_where_all_parts_do() -> None:
    content = bpe_content("1 2 3 4 12 23 123 34", "1+2 2+3 12+3 1+23 3+4")
    assert small_content(content, "123 23")["merges"] == [["1", "2"], ["2", "3"], ["12", "3"], ["1", "23"]]


def test_a_character_of_no_byte_goes_with_the_pieces_it_is_in() -> None:
    content = bpe_content("河 川 山 河川 川山", "河+川 川+山")
    assert list(small_content(content, "河川")["vocab"]) == ["河", "川", "河川"]
    assert list(small_content(content, "河川 川山 川山", min_count=2)["vocab"]) == ["河", "川", "山", "川山"]


def test_a_word_that_is_taken_whole_needs_nothing_it_could_be_joined_from() -> None:
    content = bpe_content("河 川 山 岳 河川 山岳 川山 河川山", "河+川 山+岳 川+山", ignore_merges=True)
    model = small_content(content, "河川山 山岳")
    assert list(model["vocab"]) == ["河", "川", "山", "岳", "山岳", "河川山"]
    assert model["merges"] == [["山", "岳"]] and model["ignore_merges"]


def test_a_piece_that_goes_on_a_word_is_joined_from_such() -> None:
    content = bpe_content(
        "河 川 ##河 ##川 ##山 河川 ##河川 ##河川山", "河+##川 ##河+##川 ##河川+##山", continuing_subword_prefix="##"
    )
    model = small_content(content, "##河川山")
    assert list(model["vocab"]) == ["河", "川", "##河", "##川", "##山", "##河川", "##河川山"]
    assert model["merges"] == [["##河", "##川"], ["##河川", "##山"]]


def unigram_model(scores: dict[str, float]) -> dict[str, Any]:
    return dict(json.loads(Tokenizer(models.Unigram(list(scores.items()), unk_id=1)).to_str()))


def test_the_lowest_piece_stays_since_unknown_characters_score_by_it() -> None:
    scores = {"!": 0.0, "?": 0.0, "ab": -20.0, "cd": -20.0, "bcd": -1.0, "z": -60.0, "y": -50.0}
    content = unigram_model(scores)
    assert [piece.value for piece in Tokenizer.from_str(json.dumps(content)).model.tokenize("abcd")] == ["ab", "cd"]
    model = small_content(content, "ab cd bcd")
    assert model["vocab"] == [["?", 0.0], ["ab", -20.0], ["cd", -20.0], ["bcd", -1.0], ["z", -60.0]]
    assert model["unk_id"] == 0
    small = Tokenizer.from_str(json.dumps(content | {"model": model}))
    assert [piece.value for piece in small.model.tokenize("abcd")] == ["ab", "cd"]
    without = model | {"vocab": model["vocab"][:-1]}  # then ?, bcd scores -31, ab, cd -40
    forgetful = Tokenizer.from_str(json.dumps(content | {"model": without}))
    assert [piece.value for piece in forgetful.model.tokenize("abcd")] == ["a", "bcd"]


def test_two_pieces_of_one_name_stay_where_the_unknown_one_is() -> None:
    """CamemBERT's list has <unk> twice."""
    content = unigram_model({"a": -1.0, "?": 0.0, "b": -2.0})
    content["model"]["vocab"].append(["?", -3.0])
    assert small_content(content, "b")["vocab"] == [["?", 0.0], ["b", -2.0], ["?", -3.0]]


def test_of_equal_cuts_the_same_one_is_taken() -> None:
    content = unigram_model({"!": 0.0, "?": 0.0, "a": -2.0, "aa": -3.0, "aaa": -4.0, "b": -2.0, "zz": -9.0})
    whole = Tokenizer.from_str(json.dumps(content))
    cut = [piece.value for piece in whole.model.tokenize("aaaaab")]
    small = Tokenizer.from_str(json.dumps(content | {"model": small_content(content, " ".join(cut))}))
    assert small.get_vocab_size() < whole.get_vocab_size()
    assert [piece.value for piece in small.model.tokenize("aaaaab")] == cut


# ---- models

TEXT = "abc cab bca abcabc é"
LANGUAGE_MODELS: dict[str, tuple[str, Any]] = {
    "roberta": ("roberta", RobertaConfig), "xlm-roberta": ("xlm_roberta", XLMRobertaConfig),
    "deberta-v2": ("deberta", DebertaV2Config), "modernbert": ("modernbert", ModernBertConfig),
    "gpt2": ("gpt2", GPT2Config), "llama": ("llama", LlamaConfig),
}  # fmt: skip
CAUSAL = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}


def language_model(
    family: str, tokenizer: PreTrainedTokenizerBase, tied: bool = True, **options: Any
) -> PreTrainedModel:
    """With three rows that no piece has, and random biases."""
    shape = {**tiny.SHAPE, "num_hidden_layers": 2, "vocab_size": len(tokenizer) + 3, "tie_word_embeddings": tied}
    named = {f"{use}_token_id": getattr(tokenizer, f"{use}_token_id", None) for use in ("pad", "bos", "eos", "cls")}
    config = LANGUAGE_MODELS[family][1](**{**shape, **named, **options})
    if family not in CAUSAL:
        return tiny.model(config, "mlm")
    torch.manual_seed(0)
    return CAUSAL[family](config).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_states_and_rows_are_the_same_to_the_bit(family: str, tied: bool) -> None:
    tokenizer = make(LANGUAGE_MODELS[family][0])
    model = language_model(family, tokenizer, tied)
    small = prune_vocabulary(model, tokenizer, counts(tokenizer, [TEXT, "abc"]))
    kept_W = torch.from_numpy(small.kept_ids_W)
    padded = {"padding": True} if tokenizer.pad_token else {}
    texts = [TEXT, "abc"] if padded else [TEXT]
    with torch.no_grad():
        old, new = (
            (one, one.base_model(**cutter(texts, return_tensors="pt", **padded)).last_hidden_state)
            for one, cutter in ((model, tokenizer), (small.model, small.tokenizer))
        )
        assert torch.equal(old[1], new[1])
        logits, logits_W = (vocabulary_head(one)(states) for one, states in (old, new))
        assert torch.allclose(logits[..., kept_W], logits_W, atol=1e-6)
    heads = [vocabulary_head(one) for one in (model, small.model)]
    assert torch.equal(heads[0].weight_VE[kept_W], heads[1].weight_VE)
    assert heads[0].bias_V is None or torch.equal(heads[0].bias_V[kept_W], heads[1].bias_V)
    words = small.model.get_input_embeddings().weight
    assert (small.model.get_output_embeddings().weight is words) == tied


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta"])
def test_special_tokens_in_front_keep_their_ids_and_positions_start_behind_the_padding(family: str) -> None:
    tokenizer = make(LANGUAGE_MODELS[family][0])
    small = prune_vocabulary(language_model(family, tokenizer), tokenizer, counts(tokenizer, [TEXT]))
    assert small.kept_ids_W[:4].tolist() == [0, 1, 2, 3]
    assert [small.tokenizer.convert_tokens_to_ids(token) for token in FRONT] == [0, 1, 2, 3]
    assert small.model.get_input_embeddings().padding_idx == small.model.config.pad_token_id == 1
    assert small.kept_ids_W[small.tokenizer.mask_token_id] == tokenizer.mask_token_id != small.tokenizer.mask_token_id


def test_ids_of_generation_move_with_their_tokens() -> None:
    tokenizer = make("gpt2")
    end, bc = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("bc")
    gone = tokenizer.convert_tokens_to_ids("Ġccc")
    model = language_model("gpt2", tokenizer, pad_token_id=end, decoder_start_token_id=end)
    model.generation_config.eos_token_id = [end, bc, gone]
    model.generation_config.max_new_tokens = 7
    small = prune_vocabulary(model, tokenizer, counts(tokenizer, ["abc bcbc"]))
    now, now_bc = small.tokenizer.eos_token_id, small.tokenizer.convert_tokens_to_ids("bc")
    assert small.kept_ids_W[[now, now_bc]].tolist() == [end, bc]
    assert small.model.config.bos_token_id == small.model.config.decoder_start_token_id == now
    assert small.model.generation_config.eos_token_id == [now, now_bc]
    assert small.model.generation_config.max_new_tokens == 7
    assert model.generation_config.eos_token_id == [end, bc, gone]
    ids = small.tokenizer("abc", return_tensors="pt")["input_ids"]
    assert small.model.generate(ids, do_sample=False).shape[1] <= ids.shape[1] + 7


def test_a_run_of_a_roberta_in_the_words_of_its_corpus(corpus_file: Path, tmp_path: Path) -> None:
    tokenizer = make("roberta")
    language_model("roberta", tokenizer, max_position_embeddings=40).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    run = prepare(config_of(tmp_path, str(tmp_path / "teacher"), corpus_file, layers=[0]), lambda line: None)
    small = load_tokenizer(run.config.teacher.model)
    assert run.store.meta.vocab_size == len(small) < len(tokenizer)
    texts = [row["text"] for row in sentences(20)]
    assert small(texts)["input_ids"] != tokenizer(texts)["input_ids"]
    assert [small.tokenize(text) for text in texts] == [tokenizer.tokenize(text) for text in texts]
    assert not run.store.token_counts()[small.unk_token_id]


# ---- what cannot be


def test_python_tokenizers_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"expected a fast tokenizer .*, got ByT5Tokenizer, which is Python only: keep"
    ):
        content_of(ByT5Tokenizer())


def test_other_kinds_are_refused() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    with pytest.raises(
        ModelError, match="expected a tokenizer of kind WordPiece, BPE, Unigram to prune, got WordLevel:"
    ):
        content_of(words)
