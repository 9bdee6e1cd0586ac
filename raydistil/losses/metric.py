"""Losses that shape the space of representations: rows of one class near each other, of different classes apart.

A representation is a row's first or mean last hidden state, scaled to length 1; distances are Euclidean. Rows without a
label take no part. "Triple" is DistilBERT's sum of three losses; "triplet" is this one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from raydistil.config.loss import ContrastiveConfig, TripletConfig
from raydistil.layers import Pair
from raydistil.losses.inputs import LossInputs, LossOutputs
from raydistil.losses.states import first_tokens, row_means
from raydistil.types import IGNORE


def triplet(inputs: LossInputs, pair: Pair, config: TripletConfig) -> LossOutputs:
    """max(0, margin + d(anchor, positive) - d(anchor, negative)), mean over triplets.

    `hard`: each anchor with its farthest positive and nearest negative (Hermans et al. 2017, arXiv:1703.07737).
    `semi_hard`: each anchor and positive with the nearest negative that is farther than the positive, or the farthest
    one where none is (Schroff et al. 2015, FaceNet, arXiv:1503.03832).
    `guided`: the margin grows linearly from `margin` to `largest_margin` with how much farther the negative is than the
    positive in the teacher's own space, relative to the batch's largest (Feng et al. 2019, arXiv:1905.04457).
    """
    labelled_B = inputs.labels_N != IGNORE
    labels_B = inputs.labels_N[labelled_B]
    student_BB = _distances(_represented(inputs, inputs.student_states[pair[1]], config.pooling)[labelled_B])
    anchors, positives, negatives = _mined(student_BB.detach(), labels_B, config)
    margins = student_BB.new_full((len(anchors),), config.margin)
    if config.guided:
        teacher_BB = _distances(_represented(inputs, inputs.teacher_states[pair[0]], config.pooling)[labelled_B])
        margins = _guided(teacher_BB[anchors, negatives] - teacher_BB[anchors, positives], config)
    hinge = F.relu(margins + student_BB[anchors, positives] - student_BB[anchors, negatives])
    loss = hinge.sum() / max(1, len(anchors))
    return LossOutputs(loss, {"triplet": loss.detach()})


def contrastive(inputs: LossInputs, pair: Pair, config: ContrastiveConfig) -> LossOutputs:
    """Supervised contrastive loss: -1/|P(i)| sum over positives p of log softmax over a != i of z_i z_a / temperature,
    at p; mean over the rows i that have a positive (Khosla et al. 2020, arXiv:2004.11362, L_out).
    """
    labelled_B = inputs.labels_N != IGNORE
    labels_B = inputs.labels_N[labelled_B]
    z_BD = _represented(inputs, inputs.student_states[pair[1]], config.pooling)[labelled_B]
    self_BB = torch.eye(len(z_BD), dtype=torch.bool, device=z_BD.device)
    positive_BB = (labels_B[:, None] == labels_B[None, :]) & ~self_BB
    similarity_BB = (z_BD @ z_BD.T / config.temperature).masked_fill(self_BB, torch.finfo(z_BD.dtype).min)
    log_BB = F.log_softmax(similarity_BB, -1).masked_fill(~positive_BB, 0)
    count_B = positive_BB.sum(-1)
    loss = -(log_BB.sum(-1) / count_B.clamp(min=1)).sum() / (count_B > 0).sum().clamp(min=1)
    return LossOutputs(loss, {"contrastive": loss.detach()})


def _represented(inputs: LossInputs, states_TD: Tensor, pooling: str) -> Tensor:
    pooled_BD = first_tokens(inputs, states_TD) if pooling == "first" else row_means(inputs, states_TD)
    return F.normalize(pooled_BD, dim=-1)


def _distances(unit_BD: Tensor) -> Tensor:
    """[B, B] Euclidean, from differences: 2 - 2 cos would lose the small ones. The gradient is 0 between equal rows."""
    return torch.cdist(unit_BD, unit_BD, compute_mode="donot_use_mm_for_euclid_dist")


def _mined(distance_BB: Tensor, labels_B: Tensor, config: TripletConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(anchors, positives, negatives), row numbers of the triplets."""
    same_BB = labels_B[:, None] == labels_B[None, :]
    positive_BB = same_BB & ~torch.eye(len(labels_B), dtype=torch.bool, device=labels_B.device)
    has_both_B = positive_BB.any(-1) & ~same_BB.all(-1)
    if config.mining == "hard":
        anchors = has_both_B.nonzero()[:, 0]
        if not len(anchors):
            return anchors, anchors, anchors
        farthest = distance_BB.masked_fill(~positive_BB, -1).argmax(-1)[anchors]
        return anchors, farthest, distance_BB.masked_fill(same_BB, torch.inf).argmin(-1)[anchors]
    anchors, positives = (positive_BB & has_both_B[:, None]).nonzero().T
    return anchors, positives, _semi_hard(distance_BB[anchors], distance_BB[anchors, positives], same_BB[anchors])


def _semi_hard(distance_PB: Tensor, to_positive_P: Tensor, same_PB: Tensor) -> Tensor:
    """The negative of each of P (anchor, positive) pairs."""
    if not len(distance_PB):
        return torch.zeros_like(to_positive_P, dtype=torch.int64)
    beyond_PB = ~same_PB & (distance_PB > to_positive_P[:, None])
    nearest_P = distance_PB.masked_fill(~beyond_PB, torch.inf).argmin(-1)
    farthest_P = distance_PB.masked_fill(same_PB, -1).argmax(-1)
    return torch.where(beyond_PB.any(-1), nearest_P, farthest_P)


def _guided(gap_P: Tensor, config: TripletConfig) -> Tensor:
    """Margins after the teacher's gaps d(anchor, negative) - d(anchor, positive)."""
    gap_P = gap_P.clamp(min=0)
    largest = gap_P.max().clamp(min=torch.finfo(gap_P.dtype).tiny) if len(gap_P) else 1
    return config.margin + (config.largest_margin - config.margin) * gap_P / largest
