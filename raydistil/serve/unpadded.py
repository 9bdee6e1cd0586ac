"""A model whose layers see no padding: between embeddings and head the tokens of all rows are one sequence.

B rows, L the longest, T tokens of all, S as many or up to STEP - 1 more, D hidden size, H heads.
"""

import copy
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from raydistil.attention import PLAIN
from raydistil.errors import ModelError
from raydistil.models import transformer_layers

ATTENTION = "raydistil_unpadded"  # as transformers knows it
# oneDNN makes its products anew for each length of the sequence, and keeps a thousand of them: any length would cost
# time, and in the end half a gigabyte.
STEP = 32


def unpadded(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of the same weights, the layers' products in `dtype`. Embeddings and head, which cost little, are as they
    were, and stored once. Raises ModelError for a family whose attention is more than queries, keys and values.
    """
    if model.config.model_type not in PLAIN:
        raise ModelError(f"packed: expected one of {', '.join(PLAIN)}, got {model.config.model_type}: torch pads it")
    made = shared(model)
    AttentionInterface.register(ATTENTION, _each_alone)
    AttentionMaskInterface.register(ATTENTION, _as_it_is)
    made.set_attn_implementation(ATTENTION)
    layers = transformer_layers(made)
    layers[0].register_forward_pre_hook(_pack)
    layers[-1].register_forward_hook(_unpack)
    if lays_out(model, dtype):
        for layer in layers:
            _lay_out(layer, dtype)
    return made


def shared(model: PreTrainedModel) -> PreTrainedModel:
    """One of its own, with the same tensors."""
    tensors = {id(part): part for part in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, tensors)


# ---- padding taken away, and put back


def _as_it_is(attention_mask: Tensor, **_: Any) -> Tensor:
    """[B, L], so that layers are told the rows' lengths."""
    return attention_mask


def _pack(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """To the first layer: states [B, L, D] as [1, S, D], zeros behind those of the rows."""
    states_BLD, mask_BL, *more = given
    states_TD = states_BLD[mask_BL]
    return (F.pad(states_TD, (0, 0, 0, -len(states_TD) % STEP))[None], mask_BL, *more)


def _unpack(_: Any, given: tuple[Any, ...], states_1SD: Tensor) -> Tensor:
    """From the last layer, the other way round."""
    mask_BL = given[1]
    states_BLD = states_1SD.new_zeros(*mask_BL.shape, states_1SD.shape[-1])
    states_BLD[mask_BL] = states_1SD[0, : int(mask_BL.sum())]
    return states_BLD


def _each_alone(
    _: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None = None, **__: Any
) -> tuple[Tensor, None]:
    """[1, S, H, D / H] of queries, keys and values [1, H, S, D / H]: every row looks at itself, and so do the zeros."""
    lengths: list[int] = attention_mask.sum(-1).tolist()
    lengths.append(query.shape[2] - sum(lengths))
    rows = zip(*(torch.split(part, lengths, 2) for part in (query, key, value)), strict=True)
    made = [F.scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in rows]
    return torch.cat(made, 2).transpose(1, 2), None


# ---- products


def lays_out(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether its matrices can be laid out anew: on a CPU, with oneDNN, which has products in bfloat16 for some."""
    onednn: Any = torch.backends.mkldnn
    if model.device.type != "cpu" or not onednn.is_available():
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Laid(nn.Module):
    """A linear layer whose matrix lies as oneDNN reads it: PyTorch's own would lay it out at every call."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self._matrix = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype))
        self._bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self._dtype = dtype

    def forward(self, states: Tensor) -> Tensor:
        """[..., N] in `dtype` of [..., M]."""
        given = states.to(self._dtype)
        made: Tensor = torch.ops.mkldnn._linear_pointwise(given, self._matrix, self._bias, "none", [], "")
        return made


def _lay_out(part: nn.Module, dtype: torch.dtype) -> None:
    """Sums and norms stay in float32: a layer's states are added to what its products make of them."""
    for name, inner in part.named_children():
        if type(inner) is nn.Linear:
            setattr(part, name, Laid(inner, dtype))
        else:
            _lay_out(inner, dtype)
