"""What the parts of a training run are made of: small frozen values that travel to other processes.

Kept apart from the parts themselves, so that a process that only passes them on need not import torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistil.checkpoint import CheckpointStore
from raydistil.config import EvaluateConfig, MaskingConfig
from raydistil.config.checkpoints import CheckpointsConfig
from raydistil.config.cluster import ClusterConfig
from raydistil.config.loss import LossConfig
from raydistil.config.targets import AugmentConfig, TargetsConfig
from raydistil.config.train import TrainConfig
from raydistil.layers import LayerPlan
from raydistil.manifest import Manifest
from raydistil.types import Precision, Score, Split, Task


@dataclass(frozen=True, slots=True)
class TargetsSpec:
    """What a teacher says of a micro-batch, and how that crosses the wire."""

    config: TargetsConfig
    loss: LossConfig  # which places are compared, at which temperature
    states: tuple[int, ...]  # hidden states, ascending; see `layers`
    soft_labels: bool  # whether they travel; if not, the student's side makes them of the last state, or needs none
    seed: int
    compared: bool = False  # whether states are of the compared places alone, see `places.sent_places`


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """Targets that are kept: of which inputs, where, and in which pieces. One entry of a tuple for each bucket."""

    path: Path
    fingerprint: str
    targets: TargetsSpec
    bucket_rows: tuple[int, ...]
    variants: int
    shard_rows: tuple[int, ...]  # rows of a file
    group_rows: tuple[int, ...]  # rows of a row group, the least that is read


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """Everything the content of the micro-batches depends on."""

    store: Path
    split: Split
    manifest: Manifest
    masking: MaskingConfig | None  # None: labelled examples, or a causal LM's documents
    augment: AugmentConfig | None = None
    variants: int | None = None  # sets of draws (masks, sampled places) of a row, taken in turn; None: drawn anew
    caches: tuple[CacheSpec, ...] = ()  # where the micro-batches get each teacher's targets; none: not here


@dataclass(frozen=True, slots=True)
class TeacherSpec:
    """What a teacher actor is made of."""

    model: str
    task: Task
    precision: Precision
    threads: int
    targets: TargetsSpec
    behind: bool = False  # whether its threads take what others leave of the cores


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a student worker trains, and how. Every worker gets the same one."""

    task: Task
    init: str  # directory or name of the model the training starts from
    tokenizer: str  # directory or name of the tokenizer that is saved beside it
    teachers: tuple[TeacherSpec, ...]  # the first one's hidden states count; none: labels alone
    weights: tuple[float, ...]  # of each teacher's soft labels; their sum is 1
    frozen_teacher: bool  # whether the student's side needs parts of the teacher: its vocabulary head, its attention
    teacher_width: int  # of its hidden states
    layers: LayerPlan
    labels: tuple[str, ...]
    train: TrainConfig
    loss: LossConfig
    seed: int
    threads: int
    num_steps: int  # optimizer steps of the run
    per_step: int  # micro-batches of each, on all workers together
    per_epoch: int
    mean_rows: float  # of a micro-batch: one of fewer rows counts for less
    flops_per_token: float  # matrix products that a real token takes on a student worker's cores or GPU, see `stages`
    hang_timeout_s: float  # after which another worker that does not join in is taken for dead
    traced: tuple[Path, str] | None = None  # (run's directory, stage) of the trace of every micro-batch; None: no trace

    @property
    def shares_cores(self) -> bool:
        """Whether the teachers work behind the students, on the same cores."""
        return any(teacher.behind for teacher in self.teachers)


@dataclass(frozen=True, slots=True)
class SaveSpec:
    """Where a training is saved, when, and as whose."""

    store: CheckpointStore
    config: CheckpointsConfig
    run_hash: str  # of what defines the run
    run_config: dict[str, Any]  # all of it, as it was resolved


@dataclass(frozen=True, slots=True)
class TrainRun:
    """One training run: what flows, who learns from it, and where it is kept."""

    stage: str
    source: SourceSpec
    worker: WorkerSpec
    save: SaveSpec
    cluster: ClusterConfig
    run_dir: Path


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to be scored."""

    name: str
    models: tuple[str, ...]  # directories or hub names; of several the mean prediction counts
    weights: tuple[float, ...]  # of each; their sum is 1
    timed: bool  # whether its latency belongs in the table


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One row of the table; of several teachers as one, the sums of what they take."""

    name: str
    parameters: int
    size_bytes: int  # of the weights on disk; of float32 ones where the files are not at hand
    flops_per_token: float  # of the forward pass of rows of `latency_length` tokens, see `size`
    score: Score
    latency_p50_ms: float | None = None
    macro_f1: float | None = None
    accuracy: float | None = None  # of words, where the score is of entities
    exact_match: float | None = None  # of answers
    mlm_loss: float | None = None  # nats per masked token
    clm_loss: float | None = None  # nats per token that follows another one
    perplexity: float | None = None  # exp of that
    pearson: float | None = None  # of a regression
    rmse: float | None = None


@dataclass(frozen=True, slots=True)
class EvaluateSpec:
    """What the models are scored on."""

    task: Task
    store: Path
    split: Split
    masking: MaskingConfig | None
    labels: tuple[str, ...]
    precision: Precision
    config: EvaluateConfig
    threads: int
