"""The sections of the targets: what the teacher is shown, the form in which its word travels, whether it is kept."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raydistil.config.loss import LossConfig
from raydistil.config.section import Positive, Section, Share
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
    """Sets of masks, sampled places and augmented texts a row has: in epoch e it gets number e mod k, and the cache
    holds k targets; None: new ones at every visit."""

    @model_validator(mode="after")
    def _sizes_are_used(self) -> "TargetsConfig":
        sizes = {"topk": "top_k", "sampled": "num_draws"}
        self.refuse_idle({key: f"codec = {codec}" for codec, key in sizes.items() if codec != self.codec})
        return self


class AugmentConfig(Section):
    """Variants of labelled texts that only the teacher labels; a text that stays as it was keeps its label."""

    keep: Share = 0.6
    """Share of the rows that stay as they are."""
    join: Share = 0.35
    """Of the others, the share that become parts of two texts in a row."""
    cut: Share = 0.25
    """Of the others, the share that become a part of themselves."""
    mask: Share = 0.08
    """Share of the tokens that become the mask token; so `replace` (by others, as often as they occur) and `drop`."""
    replace: Share = 0.03
    drop: Share = 0.03

    @model_validator(mode="after")
    def _shares_fit(self) -> "AugmentConfig":
        if self.join + self.cut > 1 or self.mask + self.replace + self.drop > 1:
            raise ValueError("expected join + cut and mask + replace + drop of at most 1")
        return self


def variants_of(targets: TargetsConfig) -> int | None:
    """How many sets of random draws (masks, sampled places, augmented texts) each row has; None: as many as visits.

    With a cache that is one where there is one epoch, or nothing is drawn.
    """
    return targets.mask_variants or (1 if targets.cache else None)


def check_drawn(targets: TargetsConfig, drawn: dict[str, tuple[int, str | None]]) -> None:
    """Raise ValueError where a cache could not hold what the epochs need, or nothing is drawn that could vary.

    `drawn`: (epochs, what is drawn) of every training with a teacher, by the key of its epochs.
    """
    if targets.mask_variants and not any(what for _, what in drawn.values()):
        raise ValueError(
            "distill.targets.mask_variants is of what is random in a text, which is nothing as this run is configured: "
            "leave it out"
        )
    several = {key: (epochs, what) for key, (epochs, what) in drawn.items() if what and epochs > 1}
    if several and targets.cache and targets.mask_variants is None:
        most, what = max(several.values())
        once = " and ".join(f"{key}=1" for key in several)
        raise ValueError(
            f"distill.targets.cache keeps the targets of each text, and every one of the {most} epochs has {what}: "
            f"set distill.targets.mask_variants (such as {min(most, 4)}), or {once}"
        )


def what_is_drawn(task: Task, targets: TargetsConfig, loss: LossConfig, augment: AugmentConfig | None) -> str | None:
    """What is random in a text and its targets; None: nothing."""
    if task == "mlm":
        return "masks of its own"
    if augment is not None and augment.keep < 1:
        return "augmented texts of its own (distill.augment.keep = 1 turns them off)"
    if targets.codec == "sampled" and loss.kd:
        return "draws of its own"
    sampled = task == "clm" and loss.kd and loss.kd_positions == "sample"
    return "sampled places of its own" if sampled else None
