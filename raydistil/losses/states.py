"""Losses that compare hidden states, the student's in the teacher's width: projected where theirs is another."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from raydistil.layers import Pair
from raydistil.losses.inputs import LossInputs, LossOutputs


def cosine(inputs: LossInputs, pair: Pair) -> LossOutputs:
    """1 - cos(student, teacher) of the last hidden states, mean over T (Sanh et al. 2019, arXiv:1910.01108)."""
    teacher_TD, student_TD = _states(inputs, pair)
    similarity_T = F.cosine_similarity(student_TD, teacher_TD, dim=-1)
    loss = (1 - similarity_T).sum() / max(1, len(similarity_T))
    return LossOutputs(loss, {"cosine": loss.detach()})


def hidden(inputs: LossInputs, pairs: Iterable[Pair]) -> LossOutputs:
    """Sum over pairs of the MSE of hidden states, mean over T and D (Jiao et al. 2020, TinyBERT, arXiv:1909.10351).

    FitNets (Romero et al. 2015, arXiv:1412.6550) is one pair of it.
    """
    loss = _zero(inputs)
    for teacher_TD, student_TD in (_states(inputs, pair) for pair in pairs):
        loss = loss + (student_TD - teacher_TD).square().sum() / max(1, teacher_TD.numel())
    return LossOutputs(loss, {"hidden": loss.detach()})


def pkd(inputs: LossInputs, pairs: Iterable[Pair]) -> LossOutputs:
    """Sum over pairs of |s/|s| - t/|t||^2 of first tokens, mean over B (Sun et al. 2019, arXiv:1908.09355)."""
    loss = _zero(inputs)
    for pair in pairs:
        teacher_BD, student_BD = (F.normalize(first_tokens(inputs, states), dim=-1) for states in _states(inputs, pair))
        loss = loss + (student_BD - teacher_BD).square().sum() / max(1, len(teacher_BD))
    return LossOutputs(loss, {"pkd": loss.detach()})


def first_tokens(inputs: LossInputs, states_TD: Tensor) -> Tensor:
    """[B, D]: the state of every row's first token ([CLS] where there is one)."""
    return states_TD[_starts(inputs)]


def row_means(inputs: LossInputs, states_TD: Tensor) -> Tensor:
    """[B, D]: the mean over every row's real tokens."""
    assert inputs.mask_BL is not None
    lengths_B = inputs.mask_BL.sum(-1)
    rows_T = torch.repeat_interleave(torch.arange(len(lengths_B), device=states_TD.device), lengths_B)
    sums_BD = states_TD.new_zeros(len(lengths_B), states_TD.shape[-1]).index_add(0, rows_T, states_TD)
    return sums_BD / lengths_B[:, None]


def _starts(inputs: LossInputs) -> Tensor:
    """Where each row's first token stands among the real tokens of all rows."""
    assert inputs.mask_BL is not None
    lengths_B = inputs.mask_BL.sum(-1)
    return lengths_B.cumsum(0) - lengths_B


def _states(inputs: LossInputs, pair: Pair) -> tuple[Tensor, Tensor]:
    return inputs.teacher_states[pair[0]], inputs.projected_states.get(pair[1], inputs.student_states[pair[1]])


def _zero(inputs: LossInputs) -> Tensor:
    """A sum's start, on the device."""
    return next(iter(inputs.student_states.values())).new_zeros(())
