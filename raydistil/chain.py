"""The distillations of a run, one after the other: over assistants to the student.

A student far smaller than its teacher learns more from one in between (teacher assistants: Mirzadeh et al. 2020,
arXiv:1902.03393), so a run may go 12 -> 6 -> 3 layers: each link's student is the next one's teacher.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from raydistil import rundir
from raydistil.config import Config
from raydistil.config.student import StudentConfig
from raydistil.config.train import DistillConfig
from raydistil.models import resolve


@dataclass(frozen=True, slots=True)
class Link:
    """One distillation; directories are names below the run's, or whole paths."""

    stage: str
    teachers: tuple[str, ...]  # several for the first link at most
    weights: tuple[float, ...]  # of what they say; their sum is 1
    untuned: str  # what the teacher was before it was taught: where layers of `start = "checkpoint"` are from
    student: StudentConfig
    train: DistillConfig
    init: str  # the student before
    target: str  # and after

    @property
    def general(self) -> "Link | None":
        """The general distillation before this one: whose layers the student has is its teacher."""
        if not self.train.general.epochs:
            return None
        source = self.untuned if self.student.start == "checkpoint" else self.teacher
        name, train = f"{self.stage}-general", self.train.general_training()
        return Link(name, (source,), (1.0,), source, self.student, train, f"{name}-init", name)

    def ungeneral(self) -> "Link":
        """This one without a general distillation before it."""
        if not self.train.general.epochs:
            return self
        alone = self.train.model_copy(update={"general": self.train.general.model_copy(update={"epochs": 0})})
        return replace(self, train=alone, init=f"{self.init}-ungeneral")

    @property
    def teacher(self) -> str:
        """The one whose layers the student is made of, and whose hidden states count."""
        return self.teachers[0]


def links(config: Config, teachers: tuple[str, ...], run_dir: Path) -> Iterator[Link]:
    """The links in order, the student's last. `teachers`: the directories of the first one's."""
    assert config.distill is not None
    weights, untuned = weights_of(config), resolve(config.teacher.model)
    for student, train, name in assistants(config):
        yield Link(name, teachers, weights, untuned, student, train, f"{name}-init", name)
        teachers, weights, untuned = (str(run_dir / name),), (1.0,), str(run_dir / f"{name}-init")
    yield Link(
        rundir.DISTILL, teachers, weights, untuned, config.student, config.distill, rundir.STUDENT_INIT,
        rundir.DISTILLED,
    )  # fmt: skip


def weights_of(config: Config) -> tuple[float, ...]:
    """Of the teachers' soft labels; their sum is 1."""
    weights = [config.teacher.weight, *(teacher.weight for teacher in config.ensemble)]
    return tuple(weight / sum(weights) for weight in weights)


def assistants(config: Config) -> Iterator[tuple[StudentConfig, DistillConfig, str]]:
    """(what it is made of, how it is trained, its name) of every assistant."""
    for number, (assistant, train) in enumerate(zip(config.assistants, config.trainings(), strict=False), start=1):
        student = StudentConfig(
            layers=assistant.layers, num_layers=assistant.num_layers, rule=assistant.rule, start=config.student.start
        )
        yield student, train, f"assistant-{number}"


def teacher_models(config: Config) -> tuple[str, ...]:
    """What the teachers are before any fine-tuning."""
    return (config.teacher.model, *(teacher.model for teacher in config.ensemble))
