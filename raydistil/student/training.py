"""A student as it is trained: its dropout, and the attention that is fastest on its device.

On CPUs that is one of our own (see `attend`). Under autocast Hugging Face's plain one has the softmax in float32: the
scores, the largest tensors of a layer, are copied to that and back in both directions, and scaled as a whole. Here the
queries are scaled, and all is done in the dtype they have. In float32 without dropout torch's fused attention is faster
still; its backward pass in bfloat16 takes several times as long as the matrix products, and dropout makes it fall back
to something slower.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from raydistil.attention import PLAIN

NAME = "raydistil"


def made_for_training(model: PreTrainedModel, dropout: float | None, device: torch.device) -> PreTrainedModel:
    """`model` with this dropout in every part (its configuration keeps its own) and the device's fastest attention.

    On CPUs families whose attention is more than queries, keys and values take their own plain one.
    """
    if device.type == "cpu":
        model.set_attn_implementation(NAME if model.config.model_type in PLAIN else "eager")
    for part in model.modules():
        if isinstance(part, nn.Dropout) and dropout is not None:
            part.p = dropout
    return model


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling * Q K^T) V: [B, A, L, D] each -> [B, L, A, D]. What Hugging Face calls an attention interface.

    `attention_mask`: bool, True where a query may look, or the same as what is added to the scores; [B, 1, L or 1, L].
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):
        if query.dtype == torch.float32 and not dropout:
            out = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scale)
        else:
            scores = torch.matmul(query * scale, key.transpose(2, 3))
            if attention_mask is not None:
                scores = scores + _added(attention_mask, scores.dtype)
            out = torch.matmul(F.dropout(scores.softmax(-1), dropout, module.training), value)
    return out.transpose(1, 2).contiguous(), None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
