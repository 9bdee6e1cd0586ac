"""The section of the targets: the form in which the teacher's word travels, and whether it is kept."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from raydistil.config.section import Positive, Section
from raydistil.types import Task


class TargetsConfig(Section):
    """How what the teacher says crosses the wire. Classes have few logits: there `hidden` ships them as they are."""

    codec: Literal["hidden", "logits", "topk", "sampled"] = "hidden"
    """Soft labels: made of the last hidden state on the student's side, or fp16 logits, the largest, or draws."""
    top_k: Positive = 32
    num_draws: Annotated[int, Field(ge=1, le=65_535)] = 50
    states: Literal["fp16", "bf16", "int8"] = "fp16"
    """Format of the hidden states."""
    cache: Path | None = None
    """Directory to keep the targets in, written once and read in every epoch; None: the teacher works in each."""
    mask_variants: Positive | None = None
    """Masks a row has: in epoch e it gets number e mod k, and the cache holds k targets; None: new ones every time."""


def variants_of(targets: TargetsConfig, task: Task) -> int | None:
    """How many sets of random draws (masks, sampled places) each row has; None: every visit has its own, or no draws.

    With a cache and a single epoch that is one, whether it says so or not.
    """
    if task == "classification":
        return None
    return targets.mask_variants or (1 if targets.cache else None)


def check_drawn(targets: TargetsConfig, task: Task, epochs: int) -> None:
    """Raise ValueError where a cache could not hold what the epochs need, or a key is of another task."""
    if task == "classification":
        if targets.mask_variants:
            raise ValueError("distill.targets.mask_variants is of masked texts: leave it out for task classification")
        if targets.cache and targets.codec == "sampled":
            raise ValueError("distill.targets.cache keeps logits of classes, not draws: set codec to hidden or topk")
    elif targets.cache and targets.mask_variants is None and epochs > 1:
        raise ValueError(
            f"distill.targets.cache keeps the targets of masked texts, and each of the {epochs} epochs masks them "
            f"anew: set distill.targets.mask_variants (such as {min(epochs, 4)}), or distill.epochs=1"
        )
