"""Losses that compare how tokens attend to each other. Only real tokens count, as queries and as keys, and in causal
models only the pairs that attention allows: a relation to a later token, or to another text that happens to lie in the
same block, is none that the model has.

Queries, keys and values come as [T, D], heads side by side; H heads of d = D / H numbers.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from raydistil.layers import Pair
from raydistil.losses.inputs import Attention, LossInputs, LossOutputs


def attention(inputs: LossInputs, pairs: Iterable[Pair]) -> LossOutputs:
    """Sum over pairs of the MSE of attention scores Q K^T / sqrt(d), before the softmax, mean over heads and over pairs
    of tokens of one row (Jiao et al. 2020, TinyBERT, arXiv:1909.10351, equation 7).

    The original code takes the mean over padding too, as zeros on both sides; here a row's padding has no say.
    """
    pair_BLL = _token_pairs(inputs)
    count = pair_BLL.sum().clamp(min=1)
    terms = []
    for teacher, student in _attentions(inputs, pairs):
        assert teacher.num_heads == student.num_heads, "attention scores are compared head by head"
        difference_BHLL = _scores(inputs, student) - _scores(inputs, teacher)
        squared = difference_BHLL.square() * pair_BLL[:, None]
        terms.append(squared.sum() / (count * teacher.num_heads))
    loss = torch.stack(terms).sum()
    return LossOutputs(loss, {"attention": loss.detach()})


def minilm(inputs: LossInputs, pair: Pair) -> LossOutputs:
    """KL of the attention distributions plus KL of the value relations of one layer, mean over heads and queries (Wang
    et al. 2020, MiniLM, arXiv:2002.10957). As many heads on both sides; widths may differ.
    """
    ((teacher, student),) = _attentions(inputs, [pair])
    assert teacher.num_heads == student.num_heads, "attention distributions are compared head by head"
    transfer = _kl(inputs, _scores(inputs, teacher), _scores(inputs, student))
    values = _relation_kl(inputs, teacher.values_TD, student.values_TD, teacher.num_heads)
    loss = transfer + values
    return LossOutputs(loss, {"minilm": loss.detach()})


def minilm2(inputs: LossInputs, pair: Pair, relation_heads: int) -> LossOutputs:
    """KL of the relations Q-Q, K-K and V-V, mean over parts and queries, summed over the three.

    The vectors are cut into `relation_heads` parts A; a relation is softmax(A A^T / sqrt(d)), so heads and widths of
    the models may differ (Wang et al. 2021, MiniLMv2, arXiv:2012.15828).
    """
    ((teacher, student),) = _attentions(inputs, [pair])
    loss = (
        _relation_kl(inputs, teacher.queries_TD, student.queries_TD, relation_heads)
        + _relation_kl(inputs, teacher.keys_TD, student.keys_TD, relation_heads)
        + _relation_kl(inputs, teacher.values_TD, student.values_TD, relation_heads)
    )
    return LossOutputs(loss, {"minilm": loss.detach()})


def _attentions(inputs: LossInputs, pairs: Iterable[Pair]) -> list[tuple[Attention, Attention]]:
    return [(inputs.teacher_attention[teacher], inputs.student_attention[student]) for teacher, student in pairs]


def _relation_kl(inputs: LossInputs, teacher_TD: Tensor, student_TD: Tensor, num_heads: int) -> Tensor:
    teacher_BHLd, student_BHLd = (_heads(inputs, vectors, num_heads) for vectors in (teacher_TD, student_TD))
    return _kl(inputs, _products(teacher_BHLd, teacher_BHLd), _products(student_BHLd, student_BHLd))


def _scores(inputs: LossInputs, layer: Attention) -> Tensor:
    """Attention scores [B, H, L, L]."""
    queries_BHLd = _heads(inputs, layer.queries_TD, layer.num_heads)
    return _products(queries_BHLd, _heads(inputs, layer.keys_TD, layer.num_heads))


def _products(left_BHLd: Tensor, right_BHLd: Tensor) -> Tensor:
    return left_BHLd @ right_BHLd.transpose(-1, -2) / math.sqrt(left_BHLd.shape[-1])


def _kl(inputs: LossInputs, teacher_BHLL: Tensor, student_BHLL: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) over keys, mean over heads and real queries."""
    assert inputs.mask_BL is not None
    out_BLL = ~_token_pairs(inputs)
    lowest = torch.finfo(student_BHLL.dtype).min
    log_p = F.log_softmax(teacher_BHLL.masked_fill(out_BLL[:, None], lowest), -1)
    log_q = F.log_softmax(student_BHLL.masked_fill(out_BLL[:, None], lowest), -1)
    per_key = (log_p.exp() * (log_p - log_q)).masked_fill(out_BLL[:, None], 0)
    return per_key.sum() / (inputs.mask_BL.sum().clamp(min=1) * teacher_BHLL.shape[1])


def _token_pairs(inputs: LossInputs) -> Tensor:
    """bool [B, L, L]: the query is real and may look at the key, which is real too."""
    if inputs.pairs_BLL is not None:
        return inputs.pairs_BLL
    assert inputs.mask_BL is not None
    return inputs.mask_BL[:, :, None] & inputs.mask_BL[:, None, :]


def _heads(inputs: LossInputs, vectors_TD: Tensor, num_heads: int) -> Tensor:
    """[B, H, L, d] with zeros where padding is."""
    assert inputs.mask_BL is not None
    rows, length = inputs.mask_BL.shape
    padded_BLD = vectors_TD.new_zeros(rows, length, vectors_TD.shape[-1])
    padded_BLD[inputs.mask_BL] = vectors_TD
    return padded_BLD.view(rows, length, num_heads, -1).transpose(1, 2)
