"""Losses: (LossInputs) -> LossOutputs, combined as a weighted sum whose terms are logged apart."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from raydistil.config.loss import LossConfig, TermName
from raydistil.layers import LayerPlan
from raydistil.losses.attention import attention, minilm, minilm2
from raydistil.losses.inputs import Attention, LossInputs, LossOutputs, Projection
from raydistil.losses.labels import kd_and_task
from raydistil.losses.metric import contrastive, triplet
from raydistil.losses.states import cosine, hidden, pkd

__all__ = [
    "Attention", "LossInputs", "LossOutputs", "Projection", "attention", "combined", "contrastive", "cosine", "hidden",
    "kd_and_task", "minilm", "minilm2", "pkd", "triplet", "weights_at",
]  # fmt: skip

Weights = Mapping[TermName, float]


def weights_at(config: LossConfig, progress: float) -> Weights:
    """Weight of every term when `progress` (0 to 1) of the run is done."""
    return {name: weight * _factor(config, name, progress) for name, weight in config.weights().items()}


def _factor(config: LossConfig, name: TermName, progress: float) -> float:
    schedule = config.schedule.of(name)
    if schedule is None:
        return 1.0
    if schedule.linear is not None:
        first, last = schedule.linear
        return first + (last - first) * progress
    return next(factor for share, factor in reversed(schedule.steps) if share <= progress)


def combined(inputs: LossInputs, config: LossConfig, layers: LayerPlan, weights: Weights) -> LossOutputs:
    """Weighted sum of the terms whose weight is not 0; the metrics hold each of them unweighted."""
    terms = list(_terms(inputs, config, layers, weights))
    parts = [weight * out.loss for weight, out in terms] or [_nothing(inputs)]
    loss = torch.stack(parts).sum()
    metrics = {name: value for _, out in terms for name, value in out.metrics.items()}
    return LossOutputs(loss, {"loss": loss.detach(), **metrics})


def _nothing(inputs: LossInputs) -> Tensor:
    """0, with a gradient of 0: where schedules bring every weight down to it."""
    logits = inputs.student_logits
    return 0 * (logits.features_ND if isinstance(logits, Projection) else logits).float().sum()


def _terms(
    inputs: LossInputs, config: LossConfig, layers: LayerPlan, weights: Weights
) -> Iterator[tuple[float, LossOutputs]]:
    """(weight, what came of it) of every term that has a weight; soft and hard labels weigh their own."""
    if weights["kd"] or weights["task"]:
        yield 1.0, kd_and_task(inputs, config, weights["kd"], weights["task"])
    if weights["cosine"]:
        yield weights["cosine"], cosine(inputs, layers.last)
    if weights["hidden"]:
        yield weights["hidden"], hidden(inputs, layers.hidden)
    if weights["pkd"]:
        yield weights["pkd"], pkd(inputs, layers.pkd)
    if weights["attention"]:
        yield weights["attention"], attention(inputs, layers.attention)
    if weights["minilm"] and config.minilm:
        (pair,) = layers.minilm
        two = config.minilm.version == 2
        yield weights["minilm"], minilm2(inputs, pair, config.minilm.relation_heads) if two else minilm(inputs, pair)
    if weights["triplet"] and config.triplet:
        yield weights["triplet"], triplet(inputs, layers.last, config.triplet)
    if weights["contrastive"] and config.contrastive:
        yield weights["contrastive"], contrastive(inputs, layers.last, config.contrastive)
