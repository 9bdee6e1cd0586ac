"""The sections of what is trained."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raydistil.config.loss import HiddenConfig, LossConfig
from raydistil.config.section import Beta, FastPrecision, Positive, Section, Share
from raydistil.config.targets import AugmentConfig, TargetsConfig
from raydistil.types import Task

DEFAULT_ROWS = 32
# DeepSpeed's names of what the steps, and the ledger of them, hang on.
BATCHES = {
    "train_batch_size": "micro_batch_size and accumulation", "gradient_accumulation_steps": "accumulation",
    "train_micro_batch_size_per_gpu": "micro_batch_size or micro_batch_tokens",
}  # fmt: skip


class TrainConfig(Section):
    """What the fine-tuning and the distillation loops share."""

    epochs: Positive = 3
    lr: Annotated[float, Field(gt=0)] = 5e-5
    warmup_share: Share = 0.05
    """Share of the steps over which the learning rate rises; it then falls linearly to 0."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""
    micro_batch_size: Positive = DEFAULT_ROWS
    """Rows that go through the model at once; fixed for a run."""
    micro_batch_tokens: Positive | None = None
    """Tokens, padding included, that go through it at once, in place of a number of rows: short texts many at a time,
    long ones few, so that every step takes about as long and as much memory."""
    accumulation: Positive = 1
    """Micro-batches per optimizer step and worker."""
    dropout: Share | None = None
    """Of every dropout layer while training; None: as in the model's configuration, which keeps its own."""
    freeze_embeddings: bool = False
    """Leave the word embeddings (and a vocabulary head that shares them) as they are: fewer weights to fit to a small
    corpus, and to step."""
    precision: FastPrecision = "float32"
    """Of the matrix products, `auto` as for the teacher; weights and optimizer stay float32."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 3
    """Optimizer steps whose loss or gradient is no number (nan, inf): so many are left out and named, one more ends the
    training."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Plain DeepSpeed keys, merged over the generated ones; `check` shows the outcome."""

    @model_validator(mode="after")
    def _batches_are_not_deepspeeds(self) -> "TrainConfig":
        for key, ours in BATCHES.items():
            if key in self.deepspeed:
                raise ValueError(f"deepspeed.{key} would be another number than what is counted: set {ours}")
        return self

    @model_validator(mode="after")
    def _rows_or_tokens(self) -> "TrainConfig":
        if self.micro_batch_tokens is not None and self.micro_batch_size != DEFAULT_ROWS:
            raise ValueError("expected micro_batch_size or micro_batch_tokens, got both: leave one out")
        return self


class GeneralConfig(Section):
    """General distillation before the task's (Jiao et al. 2020, TinyBERT): the hidden states, layer by layer, of the
    model whose layers the student starts from, on the training texts; their labels have no say."""

    epochs: Annotated[int, Field(ge=0)] = 0
    """0: none."""
    lr: Annotated[float, Field(gt=0)] = 5e-4


class DistillConfig(TrainConfig):
    loss: LossConfig = LossConfig()
    augment: AugmentConfig | None = None
    """Tasks of whole texts: distil on variants of the training texts, made anew in every epoch."""
    targets: TargetsConfig = TargetsConfig()
    general: GeneralConfig = GeneralConfig()

    def changed(self, epochs: int | None, lr: float | None, loss: LossConfig | None) -> "DistillConfig":
        """This one but for what is given: how an assistant is trained."""
        given = {"epochs": epochs, "lr": lr, "loss": loss}
        return self.model_copy(update={name: value for name, value in given.items() if value is not None})

    def check_sparse(self) -> None:
        """Raise ValueError for a divergence that a few probabilities are not enough for."""
        if self.targets.codec in ("topk", "sampled") and self.loss.divergence != "forward_kl":
            raise ValueError(
                f"distill.targets.codec {self.targets.codec} goes with distill.loss.divergence forward_kl only, got "
                f"{self.loss.divergence}: use codec hidden or logits"
            )

    def check_numbers(self) -> None:
        """Raise ValueError for what compares classes: a regression's soft label is the teacher's one number."""
        self._check_plain("regression")
        self.loss.check_numbers("regression")

    def check_vectors(self) -> None:
        """Raise ValueError for what compares classes or labels: a text's soft label is the teacher's vector."""
        self._check_plain("embedding")
        self.loss.check_numbers("embedding")
        if self.loss.task:
            raise ValueError("distill.loss.task is of labels: set it to 0 for task embedding")

    def _check_plain(self, task: Task) -> None:
        if self.targets.codec in ("topk", "sampled"):
            raise ValueError(
                f"distill.targets.codec: expected hidden or logits for task {task}, got {self.targets.codec}, "
                f"which is of many classes: leave it out"
            )

    def general_training(self) -> "DistillConfig":
        """How the general distillation is trained: as this one, but for its own keys and its loss."""
        layers = self.loss.hidden.layers if self.loss.hidden else ()
        loss = LossConfig(kd=0, task=0, cosine=0, hidden=HiddenConfig(layers=layers))
        changes = {"epochs": self.general.epochs, "lr": self.general.lr, "loss": loss}
        return self.model_copy(update=changes | {"general": GeneralConfig()})
