"""The sections of the teachers."""

from typing import Annotated

from pydantic import Field

from raydistil.config.loss import LossConfig
from raydistil.config.section import FastPrecision, Section
from raydistil.config.targets import TargetsConfig
from raydistil.types import Task, models_language

EnsembleWeight = Annotated[float, Field(gt=0)]


class TeacherConfig(Section):
    model: str
    """Local directory in hub layout, hub name, or `package:NAME/SUBDIR` for weights shipped in a Python package."""
    precision: FastPrecision = "float32"
    """Of the teacher's matrix products, and of those beside it; `auto`: bfloat16 where this machine is fast at it."""
    weight: EnsembleWeight = 1.0
    """Its say beside the teachers of `[[ensemble]]`; the weights are scaled to a sum of 1."""


class EnsembleConfig(Section):
    """A teacher beside `[teacher]`, with a pool of actors of its own: it has a say in the soft labels alone."""

    model: str
    """Written like teacher.model; of the same tokenizer."""
    weight: EnsembleWeight = 1.0


def check_ensemble(task: Task, loss: LossConfig, targets: TargetsConfig) -> None:
    """Raise ValueError where the soft labels of several teachers cannot be had as one."""
    if not loss.kd:
        raise ValueError("ensemble: teachers beside the first have a say in the soft labels alone: set distill.loss.kd")
    allowed = ("hidden", "logits", "sampled") if not models_language(task) else ("logits", "sampled")
    if targets.codec not in allowed:
        reason = "the tails of several teachers do not add up" if targets.codec == "topk" else "one head can be shared"
        raise ValueError(
            f"ensemble: expected distill.targets.codec of {' or '.join(allowed)} for task {task}, got {targets.codec} "
            f"({reason}): set it"
        )
