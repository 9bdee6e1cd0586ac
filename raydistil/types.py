"""The values that pass between stages.

Shape letters: B rows of a micro-batch, L padded length, T real tokens, D hidden size, C classes, V vocabulary.
Everything here is frozen, free of torch, and cheap to import: the processes that only move data need no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

Verdict = Literal["teacher-bound", "student-bound", "balanced"]  # who holds a stream up
Task = Literal[
    "classification", "regression", "token_classification", "question_answering", "embedding", "mlm", "clm"
]  # texts with a class or a number, words with one, spans of contexts, vectors of texts; masked-LM, causal LM
Content = Literal["classes", "numbers", "tags", "answers", "texts", "blocks", "documents"]
CONTENT: dict[Task, Content] = {
    "classification": "classes", "regression": "numbers", "token_classification": "tags",
    "question_answering": "answers", "embedding": "texts", "mlm": "blocks", "clm": "documents",
}  # fmt: skip
Labels = NDArray[np.int32] | NDArray[np.float32]
Precision = Literal["float32", "bfloat16"]  # of the matrix products; weights are float32
Format = Literal["hf", "bf16", "onnx", "fp16", "int8", "int8-static", "int8-torchao", "fp8-torchao"]  # of an export
TORCHAO: frozenset[Format] = frozenset({"int8-torchao", "fp8-torchao"})
IN_TORCH: frozenset[Format] = TORCHAO | {"hf", "bf16"}  # the others are ONNX
Vocabulary = Literal["teacher", "corpus"]  # of an exported student
SENTENCE_LAYOUT = "1_Pooling/config.json"  # by which Sentence Transformers knows how states become a vector
IGNORE = -100  # a label no loss looks at, the convention of torch.nn.functional.cross_entropy; of numbers it is nan
NO_TAG = -1  # the label of a word's first token where nobody knows the word's class


def models_language(task: Task) -> bool:
    """Whether the task predicts tokens of the vocabulary; the others have a head, or vectors, of their own."""
    return task in ("mlm", "clm")


def labels_texts(task: Task) -> bool:
    """Whether the task gives every text one label, a class or a number."""
    return task in ("classification", "regression")


def has_classes(task: Task) -> bool:
    """Whether the task chooses among classes, of a text or of its words."""
    return task in ("classification", "token_classification")


def takes_labels(task: Task) -> bool:
    """Whether the data's rows have labels, all of them or some."""
    return not models_language(task) and task != "embedding"


@dataclass(frozen=True, slots=True)
class Answer:
    """A span of a context, as SQuAD has it."""

    start: int  # of its first character
    text: str


@dataclass(frozen=True, slots=True)
class TextRow:
    """One example as the corpus gives it."""

    text: str
    label: str | None  # a class, or a finite number as it is written
    source: str  # where it came from: "module:qualname" or "file:row"
    split: Split
    words: tuple[str, ...] = ()  # token classification: the text is these with spaces between
    tags: tuple[str, ...] | None = None  # the class of each word; None: not known
    pair: str | None = None  # classification and regression: the second text of a pair
    context: str | None = None  # question answering: where the answer to the text stands
    answers: tuple[Answer, ...] | None = None  # none of them: there is no answer; None: not known

    @property
    def is_labelled(self) -> bool:
        return self.label is not None or self.tags is not None or self.answers is not None


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One micro-batch: the unit that is loaded, masked, labelled by the teacher, shipped and trained on.

    One of the four kinds of labels is there, the others are None. `labels_BL` holds the masked or the next tokens
    (IGNORE elsewhere); `labels_B` class ids (IGNORE: no label) or numbers (nan: no label); `tags_BL` the class of each
    word at its first token (NO_TAG: not known; IGNORE elsewhere); `spans_B2` an answer's first and last token, (0, 0)
    where the row does not hold it, IGNORE twice where it is not known.
    """

    index: int  # place in the manifest, 0 .. num_micro_batches - 1
    input_ids_BL: NDArray[np.int32]
    lengths_B: NDArray[np.int32]  # real tokens of each row; the rest is padding
    labels_B: Labels | None
    labels_BL: NDArray[np.int32] | None
    num_rows: int  # rows that count; rows beyond are padding with no weight
    visits_B: NDArray[np.int64]  # what each row's random draws hang on
    positions_BL: NDArray[np.int32] | None = None  # causal LM: place in its document, 0 starts one; see documents
    tags_BL: NDArray[np.int32] | None = None  # token classification
    spans_B2: NDArray[np.int32] | None = None  # question answering
    contexts_B: NDArray[np.int32] | None = None  # of pairs and questions: the first token of the second text

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding excluded."""
        return int(self.lengths_B.sum())


@dataclass(frozen=True, slots=True)
class TeacherTiming:
    """When a teacher worked on a micro-batch, in seconds of the wall clock."""

    lane: str  # which thread of a teacher: its name, which no other construction of a teacher has, and the thread's
    started_s: float
    ended_s: float
    tokens: int

    @property
    def teacher(self) -> str:
        """Unique for each construction, so that a rebuilt one shows."""
        return self.lane.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Sparse:
    """Soft labels at N places: probabilities of a few of the C classes of each. With the tail they sum to 1.

    The ids of a place are distinct, but for padding: an entry of probability 0 is not there, whatever its id.
    """

    ids_NK: Tensor  # int64
    probs_NK: Tensor  # float32
    tail_N: Tensor  # float32: the mass of all other classes; 0 where the entries are draws

    def rows(self, rows: slice) -> Sparse:
        return Sparse(self.ids_NK[rows], self.probs_NK[rows], self.tail_N[rows])


@dataclass(frozen=True, slots=True)
class Mixture:
    """Soft labels of several teachers at N places: what they say together is made of a few places at a time."""

    logits: tuple[Tensor, ...]  # [N, C] of each, as sent
    weights: tuple[float, ...]  # of each; their sum is 1
    temperature: float | None  # at which the weighted mean of their distributions is taken; None: that of their logits

    def rows(self, rows: slice) -> Mixture:
        return Mixture(tuple(part[rows] for part in self.logits), self.weights, self.temperature)


@dataclass(frozen=True, slots=True)
class TeacherTargets:
    """What the student learns from, on its device, as the wire rounded it. T: real tokens, row after row."""

    states: Mapping[int, Tensor]  # [T, D] float32, by state: 0 the embeddings, n what layer n made of them
    soft_labels: Tensor | Sparse | Mixture | None  # logits [N, C] as sent, or a few probabilities; None: see `states`
    compared: bool = False  # whether states are of `places.sent_places` alone, not of all T


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one optimizer step did and where its time went (rank 0)."""

    step: int
    num_steps: int
    epoch: float
    losses: dict[str, float]  # every term unweighted, and their weighted sum as "loss"
    lr: float
    student_tok_s: float
    teacher_tok_s: float  # 0 where the run has no teacher
    wait_share: float  # share of the time since the last report spent waiting for targets
    eta_s: float
    queue_depth: float  # micro-batches that lay ready for this worker
    bytes_per_token: float  # over the wire
    verdict: Verdict | None  # who holds the stream up, see `tally`; None without a teacher
    mfu: float  # share of the rate of matrix products that is made use of, see `tally`
    store_bytes: int = 0  # in use of the cluster's object stores, as the driver sees it


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """What a training run was, as seen from rank 0, since it was last started."""

    steps: int
    micro_batches: int
    tokens: int  # real ones, through the student
    wall_s: float
    wait_s: float  # the student waited for targets
    student_busy_s: float
    teacher_busy_s: float  # summed over the lanes of all teachers
    overlap_s: float  # a teacher and the student worked at once
    teacher_builds: int  # distinct teachers that were constructed
    wire_bytes: int
    final_losses: dict[str, float]
    interrupted: bool
    verdict: Verdict | None  # who held the stream up; None without a teacher
    mfu: float  # see `StepMetrics`, since the first micro-batch
    skipped_steps: int  # since the training began, for a loss or a gradient that was no number
    checkpoints: int = 0  # that were made
    saving_s: float = 0.0  # training stood still for them
    peak_store_bytes: int = 0  # most that was in use of the cluster's object stores, as the driver saw it
    spilled_bytes: int | None = None  # that went from them to a disk, whoever's they were; None: not known
    restarts: int = 0  # of the workers, since the driver last started


@dataclass(frozen=True, slots=True)
class Score:
    """A test score with its 95 % confidence interval."""

    metric: str
    value: float
    low: float
    high: float
    rows: int
