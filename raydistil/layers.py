"""Which layers a loss compares with which, and so which hidden states each side must give.

States are numbered as Hugging Face does: 0 the embeddings, n what layer n made of them. Attention of layer n is a
function of state n - 1. Free of torch: the processes that only plan a run read it too.
"""

from dataclasses import dataclass

from raydistil.config.loss import LossConfig
from raydistil.errors import ConfigError
from raydistil.types import Task, models_language

Pair = tuple[int, int]  # (teacher, student)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The pairs of each term that has a weight, empty for the others."""

    last: Pair  # states: both sides' last
    hidden: tuple[Pair, ...]  # states
    pkd: tuple[Pair, ...]  # states
    attention: tuple[Pair, ...]  # layers
    minilm: tuple[Pair, ...]  # layers, one at most
    teacher_states: tuple[int, ...]  # what the teacher must give, ascending
    student_states: tuple[int, ...]
    logits_alone: bool  # whether what the teacher gives is for its logits and nothing else

    @property
    def attention_layers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(the teacher's, the student's) layers whose attention is compared."""
        pairs = self.attention + self.minilm
        return tuple(sorted({t for t, _ in pairs})), tuple(sorted({s for _, s in pairs}))

    @property
    def projected_states(self) -> tuple[int, ...]:
        """The student's states that are held against the teacher's, number by number."""
        return tuple(sorted({student for _, student in self.hidden + self.pkd}))


def plan_layers(loss: LossConfig, task: Task, teacher_head: bool, num_teacher: int, num_student: int) -> LayerPlan:
    """What `loss` compares in models of so many layers; `teacher_head`: soft labels are made from the last state.

    Raises ConfigError for a layer that a model does not have.
    """
    weights = loss.weights()
    last = (num_teacher, num_student)
    hidden, pkd = (
        (part.layers or spread(0, num_teacher, num_student)) if part is not None and part.weight else ()
        for part in (loss.hidden, loss.pkd)
    )
    attention: tuple[Pair, ...] = ()
    if loss.attention is not None and loss.attention.weight:
        attention = loss.attention.layers or spread(1, num_teacher, num_student)
    minilm: tuple[Pair, ...] = ()
    if loss.minilm is not None and loss.minilm.weight:
        minilm = ((loss.minilm.teacher_layer or num_teacher, num_student),)
    _check({"hidden": hidden, "pkd": pkd, "attention": attention, "minilm": minilm}, last)
    guided = loss.triplet is not None and loss.triplet.guided and loss.triplet.weight > 0
    uses_last = weights["cosine"] > 0, weights["triplet"] > 0, weights["contrastive"] > 0
    states = [*hidden, *pkd, *((t - 1, s - 1) for t, s in attention + minilm)]
    teacher = {t for t, _ in states} | ({last[0]} if uses_last[0] or guided or teacher_head else set())
    student = {s for _, s in states} | ({last[1]} if any(uses_last) or models_language(task) else set())
    alone = teacher_head and not (states or uses_last[0] or guided)
    return LayerPlan(last, hidden, pkd, attention, minilm, tuple(sorted(teacher)), tuple(sorted(student)), alone)


def spread(first: int, num_teacher: int, num_student: int) -> tuple[Pair, ...]:
    """The student's n-th with the teacher's round(n * num_teacher / num_student), from `first` on (TinyBERT)."""
    return tuple((round(n * num_teacher / num_student), n) for n in range(first, num_student + 1))


def _check(terms: dict[str, tuple[Pair, ...]], last: Pair) -> None:
    for name, pairs in terms.items():
        for pair in pairs:
            if pair[0] > last[0] or pair[1] > last[1]:
                raise ConfigError(
                    f"distill.loss.{name}: expected layers up to {last[0]} of the teacher and {last[1]} of the "
                    f"student, got {list(pair)}: choose others"
                )
