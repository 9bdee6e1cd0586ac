"""Losses that two models or a task cannot give are refused before anything runs."""

from typing import Any

import pytest
from transformers import (
    BertConfig,
    LlamaConfig,
    MPNetConfig,
    PreTrainedConfig,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

from raydistil.compared import check_losses
from raydistil.config import config_of
from raydistil.config.loss import LossConfig
from raydistil.errors import RaydistilError
from raydistil.prepare import num_positions

BERT = BertConfig(hidden_size=96, num_hidden_layers=6, num_attention_heads=12)
NARROW = BertConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=6)
SHALLOW = BertConfig(hidden_size=96, num_hidden_layers=3, num_attention_heads=12)
MPNET = MPNetConfig(hidden_size=96, num_hidden_layers=6, num_attention_heads=12)
LLAMA = LlamaConfig(hidden_size=96, num_hidden_layers=6, num_attention_heads=12, num_key_value_heads=4)


def terms(task: str = "classification", **loss: Any) -> LossConfig:
    nothing: dict[str, Any] = {"kd": 1.0, "cosine": 0.0, "hidden": {"weight": 0.0}}
    config = config_of({
        "task": task, "corpus": {"source": "rows.jsonl"}, "teacher": {"model": "t"}, "student": {"num_layers": 3},
        "distill": {"loss": nothing | loss},
    })  # fmt: skip
    assert config.distill is not None
    return config.distill.loss


@pytest.mark.parametrize(
    ("loss", "teacher", "student"),
    [
        ({"cosine": 1.0}, BERT, SHALLOW),
        ({"hidden": {}}, BERT, NARROW),
        ({"pkd": {}}, BERT, NARROW),
        ({"attention": {}}, BERT, SHALLOW),
        ({"minilm": {"version": 1}}, BERT, SHALLOW),
        ({"minilm": {"relation_heads": 24}}, BERT, NARROW),
        ({"minilm": {"relation_heads": 4}}, MPNET, NARROW),
        ({"minilm": {"relation_heads": 32}}, LLAMA, SHALLOW),
        ({"triplet": {}, "contrastive": {}}, BERT, NARROW),
    ],
)
def test_what_goes_together(loss: dict[str, Any], teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    check_losses("classification", terms(**loss), teacher, student)


@pytest.mark.parametrize(
    ("loss", "teacher", "student", "words"),
    [
        ({"cosine": 1.0}, BERT, NARROW, "distill.loss.cosine compares hidden states of one width, got 96 .* and 48"),
        ({"attention": {}}, BERT, NARROW, "distill.loss.attention: expected as many attention heads .* got 6 and 12"),
        ({"minilm": {"version": 1}}, BERT, NARROW, "distill.loss.minilm: expected as many attention heads"),
        ({"attention": {}}, MPNET, SHALLOW, "distill.loss.attention: expected a model whose .* got mpnet"),
        ({"minilm": {"version": 1}}, MPNET, SHALLOW, "distill.loss.minilm: .* got mpnet: use .* version 2"),
        ({"minilm": {}}, BERT, T5Config(), "distill.loss.minilm: expected one of bert, .* got t5: leave that loss out"),
        ({"minilm": {"relation_heads": 32}}, BERT, NARROW, "relation_heads: expected a divisor of 48, 96, got 32"),
        ({"minilm": {"relation_heads": 48}}, LLAMA, SHALLOW, "relation_heads: expected a divisor of 32, 96, got 48"),
        ({"hidden": {"layers": [[7, 1]]}}, BERT, SHALLOW, "distill.loss.hidden: expected layers up to 6"),
    ],
)
def test_what_does_not(loss: dict[str, Any], teacher: PreTrainedConfig, student: PreTrainedConfig, words: str) -> None:
    with pytest.raises(RaydistilError, match=words):
        check_losses("classification", terms(**loss), teacher, student)


@pytest.mark.parametrize("name", ["triplet", "contrastive"])
def test_classes_are_needed_to_tell_them_apart(name: str) -> None:
    with pytest.raises(RaydistilError, match=f"distill.loss.{name}: expected task classification, got mlm"):
        check_losses("mlm", terms("mlm", **{name: {}}), BERT, SHALLOW)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (BertConfig(max_position_embeddings=512), 512),
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (T5Config(), None),
        (XLNetConfig(), None),
    ],
)
def test_positions_a_model_has(shape: PreTrainedConfig, expected: int | None) -> None:
    assert num_positions(shape) == expected
