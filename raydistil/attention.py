"""Queries, keys and values of a layer as a function of the hidden states it was given.

They are linear in the (normed) state, so the wire need not carry them: the student's side holds the teacher's frozen
matrices and makes them of the state. Positions that are added inside the attention (rotary, relative) are left out.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from raydistil.errors import ModelError
from raydistil.losses.inputs import Attention
from raydistil.models import transformer_layers

Three = tuple[Tensor, Tensor, Tensor]
# Families whose attention scores are Q K^T / sqrt(d) of these and nothing else.
PLAIN = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")


def attention_of(model: PreTrainedModel, layer: int, state_TD: Tensor) -> Attention:
    """Of layer `layer`, counted from 1, given state `layer - 1`; float32. Raises ModelError for an unknown family."""
    made = _maker(model)(transformer_layers(model)[layer - 1], state_TD)
    queries_TD, keys_TD, values_TD = (vectors_TD.float() for vectors_TD in made)
    return Attention(queries_TD, keys_TD, values_TD, model.config.num_attention_heads)


def check_attention(model_type: str, plain: bool, key: str) -> None:
    """Raise ModelError where the loss `key` cannot be had of a family; `plain`: it compares attention scores."""
    if plain and model_type not in PLAIN:
        raise ModelError(
            f"{key}: expected a model whose attention scores are its queries times its keys ({', '.join(PLAIN)}), got "
            f"{model_type}: use distill.loss.minilm version 2"
        )
    if model_type not in MAKERS:
        raise ModelError(f"{key}: expected one of {', '.join(MAKERS)}, got {model_type}: leave that loss out")


def _maker(model: PreTrainedModel) -> Callable[[Any, Tensor], Three]:
    check_attention(model.config.model_type, False, "distill.loss")
    return MAKERS[model.config.model_type]


def _bert(layer: Any, state_TD: Tensor) -> Three:
    own = layer.attention.self
    return own.query(state_TD), own.key(state_TD), own.value(state_TD)


def _distilbert(layer: Any, state_TD: Tensor) -> Three:
    return layer.attention.q_lin(state_TD), layer.attention.k_lin(state_TD), layer.attention.v_lin(state_TD)


def _mpnet(layer: Any, state_TD: Tensor) -> Three:
    own = layer.attention.attn
    return own.q(state_TD), own.k(state_TD), own.v(state_TD)


def _deberta(layer: Any, state_TD: Tensor) -> Three:
    own = layer.attention.self
    return own.query_proj(state_TD), own.key_proj(state_TD), own.value_proj(state_TD)


def _modernbert(layer: Any, state_TD: Tensor) -> Three:
    queries, keys, values = layer.attn.Wqkv(layer.attn_norm(state_TD)).chunk(3, -1)
    return queries, keys, values


def _gpt2(layer: Any, state_TD: Tensor) -> Three:
    queries, keys, values = layer.attn.c_attn(layer.ln_1(state_TD)).chunk(3, -1)
    return queries, keys, values


def _qwen3(layer: Any, state_TD: Tensor) -> Three:
    """Queries and keys are normed head by head."""
    own, (queries_TD, keys_TD, values_TD) = layer.self_attn, _llama(layer, state_TD)

    def normed(norm: Any, vectors_TD: Tensor) -> Tensor:
        by_head: Tensor = norm(vectors_TD.view(len(vectors_TD), -1, own.head_dim))
        return by_head.flatten(1)

    return normed(own.q_norm, queries_TD), normed(own.k_norm, keys_TD), values_TD


def _llama(layer: Any, state_TD: Tensor) -> Three:
    own, normed_TD = layer.self_attn, layer.input_layernorm(state_TD)
    return own.q_proj(normed_TD), own.k_proj(normed_TD), own.v_proj(normed_TD)


MAKERS: dict[str, Callable[[Any, Tensor], Three]] = {
    "bert": _bert, "roberta": _bert, "xlm-roberta": _bert, "camembert": _bert, "electra": _bert,
    "distilbert": _distilbert, "mpnet": _mpnet, "deberta-v2": _deberta, "modernbert": _modernbert, "gpt2": _gpt2,
    "llama": _llama, "mistral": _llama, "qwen2": _llama, "qwen3": _qwen3,
}  # fmt: skip
