"""The terms of the distillation loss: pure functions of one micro-batch, float32 inside, means over what they compare.

N compared places: rows of a classification batch, or tokens. C classes or vocabulary. T real tokens. D hidden size.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from raydistil.types import IGNORE


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What student and teacher say of one micro-batch, all float32; teacher fields None where there is no teacher."""

    student_logits_NC: Tensor
    labels_N: Tensor  # int64; IGNORE where there is none
    student_hidden_TD: Tensor
    teacher_logits_NC: Tensor | None = None
    teacher_hidden_TD: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """A scalar to minimise, and detached scalars to log."""

    loss: Tensor
    metrics: dict[str, Tensor]


def kd(inputs: LossInputs, temperature: float) -> LossOutputs:
    """T^2 KL(softmax(t / T) || softmax(s / T)), mean over N (Hinton et al. 2015, arXiv:1503.02531, section 2)."""
    teacher = _given(inputs.teacher_logits_NC)
    student_NC = F.log_softmax(inputs.student_logits_NC / temperature, dim=-1)
    teacher_NC = F.log_softmax(teacher / temperature, dim=-1)
    total = F.kl_div(student_NC, teacher_NC, reduction="sum", log_target=True)
    loss = temperature**2 * total / max(1, len(student_NC))
    return LossOutputs(loss, {"kd": loss.detach()})


def task(inputs: LossInputs) -> LossOutputs:
    """Cross-entropy with the data's labels, mean over the places that have one (classes, or masked tokens)."""
    total = F.cross_entropy(inputs.student_logits_NC, inputs.labels_N, ignore_index=IGNORE, reduction="sum")
    loss = total / (inputs.labels_N != IGNORE).sum().clamp(min=1)
    return LossOutputs(loss, {"task": loss.detach()})


def cosine(inputs: LossInputs) -> LossOutputs:
    """1 - cos(student, teacher) of the last hidden states, mean over T (Sanh et al. 2019, arXiv:1910.01108)."""
    similarity_T = F.cosine_similarity(inputs.student_hidden_TD, _given(inputs.teacher_hidden_TD), dim=-1)
    loss = (1 - similarity_T).sum() / max(1, len(similarity_T))
    return LossOutputs(loss, {"cosine": loss.detach()})


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "a loss that compares with the teacher needs the teacher's side"
    return tensor
