"""Sizes and FLOPs, in closed form and against torch's own count."""

from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from raydistil.size import describe_model

pytestmark = pytest.mark.usefixtures("one_thread")

D, F, V, P = 768, 3072, 30522, 512


def outlined(maker: Any, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = maker(config)
    return model


def masked_lm_flops(num_layers: int, length: int) -> int:
    """Four D x D matrices and two D x F ones a layer, its attention, and the head."""
    return num_layers * (2 * (4 * D * D + 2 * D * F) + 4 * length * D) + 2 * (D * D + D * V)


@pytest.mark.parametrize("length", [128, 512])
def test_bert_base_in_closed_form(length: int) -> None:
    size = describe_model(outlined(BertForMaskedLM, BertConfig()), length)
    assert size.parameters == 109_514_298
    assert size.embedding_parameters == (V + P + 2) * D
    assert size.bytes == 4 * 109_514_298
    assert size.flops_per_token == masked_lm_flops(12, length)
    assert size.line().startswith("109.5 M parameters (23.8 M embeddings), 418 MiB, 0.2")


def test_distilbert_in_closed_form() -> None:
    size = describe_model(outlined(DistilBertForMaskedLM, DistilBertConfig()), 128)
    assert size.parameters == 66_985_530
    assert size.embedding_parameters == (V + P) * D
    assert size.flops_per_token == masked_lm_flops(6, 128)


def test_a_class_head_is_applied_once_a_row() -> None:
    size = describe_model(outlined(BertForSequenceClassification, BertConfig(num_labels=3)), 128)
    layers = masked_lm_flops(12, 128) - 2 * (D * D + D * V)
    assert size.flops_per_token == layers + 2 * (D * D + 3 * D) / 128


def test_bytes_are_of_the_weights_as_stored() -> None:
    model = outlined(BertForMaskedLM, BertConfig(**tiny.SHAPE))
    whole, half = describe_model(model, 8), describe_model(model.to(torch.bfloat16), 8)
    assert (half.parameters, 2 * half.bytes) == (whole.parameters, whole.bytes)


def counted(model: PreTrainedModel, rows: int, length: int) -> int:
    """FLOPs of a forward pass as torch counts them, with attention as plain matrix products."""
    model.set_attn_implementation("eager")
    ids_BL = torch.zeros(rows, length, dtype=torch.int64) + 5
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL))
    return int(counter.get_total_flops())


MODERN = ModernBertConfig(
    **tiny.SHAPE, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3, local_attention=4
)
DISTILBERT = DistilBertConfig(vocab_size=45, dim=16, n_layers=3, n_heads=2, hidden_dim=24, max_position_embeddings=32)


@pytest.mark.parametrize("task", ["mlm", "classification"])
@pytest.mark.parametrize("config", [*tiny.FAMILIES.values(), MODERN, DISTILBERT], ids=lambda config: config.model_type)
def test_torch_counts_the_same_for_encoders(config: PreTrainedConfig, task: Any) -> None:
    model = tiny.model(config, task)
    assert 3 * 12 * describe_model(model, 12).flops_per_token == pytest.approx(counted(model, 3, 12), rel=1e-12)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=45, n_embd=16, n_layer=3, n_head=2, n_positions=32),
        LlamaConfig(**tiny.SHAPE, num_key_value_heads=1, head_dim=12),
    ],
    ids=lambda config: config.model_type,
)
def test_torch_counts_the_same_for_decoders(config: PreTrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config).eval()
    assert 3 * 12 * describe_model(model, 12).flops_per_token == pytest.approx(counted(model, 3, 12), rel=1e-12)


def test_tables_that_are_shared_count_once() -> None:
    model = tiny.model(BertConfig(**tiny.SHAPE), "mlm")
    before = describe_model(model, 8)
    model.bert.embeddings.again = model.get_input_embeddings()
    assert describe_model(model, 8) == before
    model.bert.embeddings.other = nn.Embedding(3, 5)
    assert describe_model(model, 8).embedding_parameters == before.embedding_parameters + 15
