"""Losses: (LossInputs) -> LossOutputs, combined as a weighted sum whose terms are logged apart."""

from torch import Tensor

from raydistil.config import LossConfig
from raydistil.losses.terms import LossInputs, LossOutputs, cosine, kd, task

__all__ = ["LossInputs", "LossOutputs", "combined", "cosine", "kd", "task"]


def combined(inputs: LossInputs, config: LossConfig) -> LossOutputs:
    """Weighted sum of the terms whose weight is not 0; the metrics hold each of them unweighted."""
    loss = inputs.student_logits_NC.new_zeros(())
    metrics: dict[str, Tensor] = {}
    if config.kd:
        out = kd(inputs, config.temperature)
        loss, metrics = loss + config.kd * out.loss, metrics | out.metrics
    if config.task:
        out = task(inputs)
        loss, metrics = loss + config.task * out.loss, metrics | out.metrics
    if config.cosine:
        out = cosine(inputs)
        loss, metrics = loss + config.cosine * out.loss, metrics | out.metrics
    return LossOutputs(loss, {"loss": loss.detach(), **metrics})
