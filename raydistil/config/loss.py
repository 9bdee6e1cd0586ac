"""The sections of the loss: which terms there are, what they weigh, and what they compare."""

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from raydistil.config.section import Beta, Positive, Section, Share
from raydistil.types import Task

Weight = Annotated[float, Field(ge=0)]
Layer = Annotated[int, Field(ge=0)]
TermName = Literal["kd", "task", "cosine", "hidden", "pkd", "attention", "minilm", "triplet", "contrastive"]


class HiddenConfig(Section):
    weight: Weight = 1.0
    layers: tuple[tuple[Layer, Layer], ...] = ()
    """(teacher, student) pairs of hidden states, 0 the embeddings; empty: every one of the student's, evenly spread."""


class AttentionConfig(Section):
    weight: Weight = 1.0
    layers: tuple[tuple[Positive, Positive], ...] = ()
    """(teacher, student) pairs of layers, counted from 1; empty: every layer of the student, evenly spread."""


class MiniLMConfig(Section):
    weight: Weight = 1.0
    version: Literal[1, 2] = 2
    """1: attention distributions and value relations. 2: relations of queries, keys and values, each with itself."""
    teacher_layer: Positive | None = None
    """Counted from 1; None: the last. Large teachers do best somewhat below it."""
    relation_heads: Positive = 48
    """Of version 2: into how many parts the vectors are cut; must divide both hidden sizes."""

    @model_validator(mode="after")
    def _heads_are_used(self) -> "MiniLMConfig":
        if self.version == 1:
            self.refuse_idle({"relation_heads": "version = 2"})
        return self


class TripletConfig(Section):
    weight: Weight = 1.0
    margin: Annotated[float, Field(gt=0)] = 0.2
    """Of Euclidean distances between representations of length 1."""
    mining: Literal["hard", "semi_hard"] = "hard"
    guided: bool = False
    """Margins between `margin` and `largest_margin` after the teacher's own distances (Feng et al. 2019)."""
    largest_margin: Annotated[float, Field(gt=0)] = 0.5
    pooling: Literal["first", "mean"] = "first"
    """What represents a text: the last hidden state of its first token, or the mean over its tokens."""

    @model_validator(mode="after")
    def _margins_ascend(self) -> "TripletConfig":
        if self.guided and self.largest_margin < self.margin:
            raise ValueError("expected largest_margin to be at least margin")
        if not self.guided:
            self.refuse_idle({"largest_margin": "guided = true"})
        return self


class ContrastiveConfig(Section):
    weight: Weight = 1.0
    temperature: Annotated[float, Field(gt=0)] = 0.1
    pooling: Literal["first", "mean"] = "first"
    """What represents a text: the last hidden state of its first token, or the mean over its tokens."""


class ScheduleConfig(Section):
    """A factor on a term's weight over the run: either `linear` or `steps`."""

    linear: tuple[Weight, Weight] | None = None
    """From the first step's to the last step's."""
    steps: tuple[tuple[Share, Weight], ...] = ()
    """(share of the run, factor from there on), ascending, from 0 on."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "ScheduleConfig":
        if (self.linear is None) != bool(self.steps):
            raise ValueError("expected either linear = [from, to] or steps = [[share, factor], ...]")
        shares = [share for share, _ in self.steps]
        if shares and (shares[0] != 0 or shares != sorted(set(shares))):
            raise ValueError("expected steps with ascending shares of the run, the first of them 0")
        return self


class SchedulesConfig(Section):
    """By term; what is left out stays as it is."""

    kd: ScheduleConfig | None = None
    task: ScheduleConfig | None = None
    cosine: ScheduleConfig | None = None
    hidden: ScheduleConfig | None = None
    pkd: ScheduleConfig | None = None
    attention: ScheduleConfig | None = None
    minilm: ScheduleConfig | None = None
    triplet: ScheduleConfig | None = None
    contrastive: ScheduleConfig | None = None

    def of(self, term: TermName) -> ScheduleConfig | None:
        found: ScheduleConfig | None = getattr(self, term)
        return found


class LossConfig(Section):
    """A sum of weighted terms; each is logged apart and unweighted."""

    triple: bool = False
    """DistilBERT's loss of language models, under its name: 5 kd at temperature 2 over all tokens + 2 task + 1 cosine.

    What else is set has its own value.
    """
    kd: Weight = 5.0
    """Soft labels: the divergence below (Hinton et al. 2015)."""
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "mse"] = "forward_kl"
    """`forward_kl`: T^2 KL(teacher || student). `mse`: of the logits, at no temperature; what tasks
    regression and embedding have."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of `jensen_shannon`: the teacher's share of the mixture."""
    kd_positions: Literal["masked", "all", "sample"] = "masked"
    """Where a language model's soft labels are compared: masked tokens, all real ones (DistilBERT), or a sample.

    With task clm `masked` and `all` are the same: wherever a token of the same document follows.
    """
    kd_sample: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the tokens in such a sample, drawn anew in every micro-batch from the seed."""
    task: Weight = 2.0
    """With the data's own labels: cross-entropy of classes, masked or next tokens; squared error of numbers."""
    label_smoothing: Beta = 0.0
    cosine: Weight = 1.0
    """1 - cos of the last hidden states (Sanh et al. 2019)."""
    hidden: HiddenConfig | None = None
    """MSE of hidden states, through a learned projection where the widths differ (TinyBERT, FitNets)."""
    pkd: HiddenConfig | None = None
    """Squared distance of normalised hidden states of the first token (Sun et al. 2019, patient KD)."""
    attention: AttentionConfig | None = None
    """MSE of attention scores (TinyBERT)."""
    minilm: MiniLMConfig | None = None
    triplet: TripletConfig | None = None
    contrastive: ContrastiveConfig | None = None
    """Supervised contrastive loss (Khosla et al. 2020)."""
    schedule: SchedulesConfig = SchedulesConfig()
    """Factors on the weights over the run, by term."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> "LossConfig":
        if not any(self.weights().values()):
            raise ValueError(f"expected at least one of {', '.join(TERMS)} with a weight above 0")
        self.refuse_idle({
            **({} if self.kd_positions == "sample" else {"kd_sample": "kd_positions = sample"}),
            **({} if self.divergence == "jensen_shannon" else {"beta": "divergence = jensen_shannon"}),
        })  # fmt: skip
        idle = [name for name, weight in self.weights().items() if self.schedule.of(name) and not weight]
        if idle:
            raise ValueError(f"schedule.{idle[0]}: expected a schedule of a term that has a weight")
        return self

    def weights(self) -> dict[TermName, float]:
        """Weight of every term, 0 where it is left out."""
        parts: dict[TermName, HiddenConfig | AttentionConfig | MiniLMConfig | TripletConfig | ContrastiveConfig | None]
        parts = {
            "hidden": self.hidden, "pkd": self.pkd, "attention": self.attention, "minilm": self.minilm,
            "triplet": self.triplet, "contrastive": self.contrastive,
        }  # fmt: skip
        scalars: dict[TermName, float] = {"kd": self.kd, "task": self.task, "cosine": self.cosine}
        return scalars | {name: part.weight if part else 0.0 for name, part in parts.items()}

    def check_texts(self, task: Task) -> None:
        """Raise ValueError for what only language models have."""
        if self.triple:
            raise ValueError(
                f"distill.loss.triple is DistilBERT's loss of language models, expected task mlm or clm, got {task}: "
                f"leave it out (or did you mean distill.loss.triplet?)"
            )
        if self.kd_positions != "masked":
            raise ValueError(f"distill.loss.kd_positions is of language models' tokens: leave it out for task {task}")

    def check_causal(self) -> None:
        """Raise ValueError for a term that a causal language model has no use for.

        A first token knows nothing of its text, and attention scores are compared over pairs that attention leaves out.
        """
        weights = self.weights()
        found = [name for name in ("pkd", "attention", "triplet", "contrastive") if weights[name]]
        found += ["minilm version 1"] if weights["minilm"] and self.minilm and self.minilm.version == 1 else []
        if found:
            raise ValueError(
                f"distill.loss: expected kd, task, cosine, hidden or minilm version 2 for task clm, got {found[0]}: "
                f"leave it out"
            )

    def check_places(self) -> None:
        """Raise ValueError for a mean over places: those of the question, and of padding, are none of an answer."""
        if self.label_smoothing:
            raise ValueError("distill.loss.label_smoothing is of classes: leave it out for task question_answering")
        if self.weights()["kd"] and self.divergence == "mse":
            raise ValueError(
                "distill.loss.divergence: expected one of distributions for task question_answering, got mse: leave "
                "it out"
            )

    def check_numbers(self, task: Task) -> None:
        """Raise ValueError for what compares distributions over classes, which a regression does not have."""
        weights = self.weights()
        if weights["kd"] and self.divergence != "mse":
            raise ValueError(
                f"distill.loss.divergence: expected mse for task {task}, got {self.divergence}: what its teacher "
                f"says is no distribution, set mse"
            )
        if self.label_smoothing:
            raise ValueError(f"distill.loss.label_smoothing is of classes: leave it out for task {task}")
        for name in ("triplet", "contrastive"):
            if weights[name]:
                raise ValueError(f"distill.loss.{name} is of classes: leave it out for task {task}")


TERMS: tuple[TermName, ...] = get_args(TermName)
