"""The section of the student: what it starts from."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raydistil.config.loss import LossConfig
from raydistil.config.section import Positive, Section

LayerRule = Literal["uniform", "first", "last", "every_other"]
Narrowing = Literal["importance", "svd", "random"]


class AssistantConfig(Section):
    """A model between teacher and student, with the student's own settings but for these."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Layers of the model before it in the chain, counted from 0."""
    num_layers: Positive | None = None
    """How many layers, instead of a list of them; `rule` chooses which."""
    rule: LayerRule = "uniform"
    epochs: Positive | None = None
    """Of its own distillation; None: `distill.epochs`."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Of its own distillation; None: `distill.lr`."""
    loss: LossConfig | None = None
    """Of its own distillation, written like `distill.loss`; None: that one."""

    @model_validator(mode="after")
    def _one_choice(self) -> "AssistantConfig":
        if bool(self.layers) == bool(self.num_layers):
            raise ValueError("expected either layers (a list) or num_layers (how many, chosen by rule)")
        return self


class StudentConfig(Section):
    layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Teacher layers the student starts from, counted from 0: DistilBERT is [0, 2, 4, 7, 9, 11] of 12."""
    num_layers: Positive | None = None
    """How many layers, instead of a list of them; `rule` chooses which."""
    rule: LayerRule = "uniform"
    """`uniform`: evenly spread, first and last included. `every_other`: 0, 2, 4 ... `first`, `last`: those."""
    start: Literal["finetuned", "checkpoint"] = "finetuned"
    """Whose layers they are: the fine-tuned teacher's, or `teacher.model`'s as it came, below the fine-tuned head."""
    model: str | None = None
    """Start from this checkpoint instead (written like teacher.model); it must have the teacher's vocabulary."""
    family: Literal["same", "distilbert"] = "same"
    """`same`: the teacher's architecture, shallower or narrower. `distilbert`: no token types, no pooler."""
    vocabulary: Literal["whole", "corpus"] = "whole"
    """`corpus`: only the tokens that the training texts use (and those these are made from), in teacher and student."""
    hidden_size: Positive | None = None
    """Width of the student; None: the teacher's. Without `layers` and `num_layers` all layers are kept."""
    num_heads: Positive | None = None
    """Attention heads of a layer; None: as many of the teacher's head size as fill `hidden_size`."""
    ffn_size: Positive | None = None
    """Neurons of a feed-forward part; None: the teacher's."""
    narrow: Narrowing = "importance"
    """What a narrower student starts from: the units of the `importance` largest in the teacher's weights, the main
    directions of its embeddings (`svd`), or fresh weights (`random`)."""

    @model_validator(mode="after")
    def _one_start(self) -> "StudentConfig":
        if self.layers and self.num_layers:
            raise ValueError("expected either layers (a list) or num_layers (how many, chosen by rule)")
        if bool(self.layers or self.num_layers or self.is_narrower) == bool(self.model):
            raise ValueError(
                "expected either layers, num_layers or a width (of the teacher) or model (a checkpoint of its own)"
            )
        if self.rule != "uniform" and not self.num_layers:
            raise ValueError("rule chooses num_layers layers: set num_layers, or leave rule out")
        return self

    @model_validator(mode="after")
    def _one_vocabulary(self) -> "StudentConfig":
        if self.vocabulary == "corpus" and self.model:
            raise ValueError("vocabulary is that of the teacher, cut down: leave it out for a model of its own")
        return self

    @model_validator(mode="after")
    def _one_width(self) -> "StudentConfig":
        if self.narrow != "importance" and not self.is_narrower:
            raise ValueError("narrow says how a narrower student starts: set hidden_size, num_heads or ffn_size")
        if self.is_narrower and self.family != "same":
            raise ValueError(f"family {self.family} keeps the teacher's width: use family same for a narrower student")
        return self

    @property
    def is_narrower(self) -> bool:
        return bool(self.hidden_size or self.num_heads or self.ffn_size)
