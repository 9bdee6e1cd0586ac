"""What came through Ray beside what it was made from; the library's losses and gradients beside a reference's."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import reference
import torch
from sources import streamed
from torch import Tensor, nn
from transformers import PreTrainedModel

from raydistil import wire
from raydistil.config.loss import LossConfig
from raydistil.config.student import StudentConfig
from raydistil.config.targets import TargetsConfig
from raydistil.distiller import Distiller
from raydistil.layers import plan_layers
from raydistil.losses import weights_at
from raydistil.models import HeadedEncoder, load_model
from raydistil.source import MicroBatches
from raydistil.specs import SourceSpec, TargetsSpec, TeacherSpec
from raydistil.student import build_student
from raydistil.targets import decode_targets
from raydistil.teacher import Teacher
from raydistil.types import Task, TeacherTargets, TokenBatch

CPU = torch.device("cpu")
ALL_STATES = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Streamed:
    """One micro-batch with its targets, and what it was made from."""

    task: Task
    teacher_dir: str
    labels: tuple[str, ...]
    targets: TargetsSpec
    batch: TokenBatch
    given: TeacherTargets
    made: TokenBatch  # the same micro-batch, made here

    def student(self) -> PreTrainedModel:
        torch.manual_seed(5)
        teacher = load_model(self.teacher_dir, self.task, self.labels)
        return build_student(teacher, StudentConfig(layers=(0, 2)), self.task)

    def teacher(self) -> PreTrainedModel:
        return load_model(self.teacher_dir, self.task).requires_grad_(False).eval()


def one_micro_batch(
    task: Task, folder: str, source: SourceSpec, config: TargetsConfig, soft: bool, loss: LossConfig, ray: bool,
    labels: tuple[str, ...] = (),
) -> Streamed:  # fmt: skip
    """The fourth micro-batch of the stream; without `ray` the teacher alone makes it, for other codecs."""
    targets = TargetsSpec(config, loss, ALL_STATES, soft, 3)
    spec = TeacherSpec(folder, task, "float32", 1, targets)
    if ray:
        row = streamed(source, (spec,), total=4)[3]
    else:
        (row,) = Teacher(spec)(wire.table_of([MicroBatches(source).make(3)]))
    batch = wire.batch_of(row)
    given = decode_targets(targets, wire.targets_of(row)[0], batch.num_tokens, CPU)
    return Streamed(task, folder, labels, targets, batch, given, MicroBatches(source).make(3))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


RowsOf = Callable[[PreTrainedModel, TokenBatch, dict[int, Tensor]], reference.Rows]


def check(
    case: Streamed, config: LossConfig, expected: Callable[[PreTrainedModel, reference.Rows], Tensor],
    rows_of: RowsOf = reference.student_rows,
) -> None:  # fmt: skip
    """Loss and gradients of the library on what was streamed, against `expected` on what was made here."""
    distiller, loss = trained(case, case.student(), config)
    rows = rows_of(distiller.model, case.made, dict(case.given.states))
    _same(distiller, loss, expected(distiller.model, rows))


def check_narrow(
    case: Streamed, config: LossConfig, expected: Callable[[PreTrainedModel, reference.Rows, reference.Rows], Tensor]
) -> None:
    """As `check`, of a student half as wide: `expected` gets its rows, and those with its states projected."""
    narrow = StudentConfig(layers=(0, 2), hidden_size=16, num_heads=2)
    torch.manual_seed(5)
    student = build_student(load_model(case.teacher_dir, case.task, case.labels), narrow, case.task)
    distiller, loss = trained(case, student, config)
    rows = reference.student_rows(student, case.made, dict(case.given.states))
    projected = [([_projected(distiller, n, state) for n, state in enumerate(states)], *rest) for states, *rest in rows]
    _same(distiller, loss, expected(student, rows, projected))


def _projected(distiller: Distiller, n: int, state_TD: Tensor) -> Tensor:
    return distiller.projections[str(n)](state_TD) if str(n) in distiller.projections else state_TD


def trained(case: Streamed, student: PreTrainedModel, config: LossConfig) -> tuple[Distiller, Tensor]:
    """The library's module around `student`, and its loss of the micro-batch."""
    layers = plan_layers(config, case.task, case.task != "classification" and not case.targets.soft_labels, 4, 2)
    teacher = case.teacher()
    encoder = HeadedEncoder(student, case.task, "float32")
    distiller = Distiller(encoder, config, layers, case.targets.seed, teacher).train()
    distiller.project(teacher.config.hidden_size)
    return distiller, distiller(case.batch, case.given, weights_at(config, 0.0)).loss


def _same(distiller: Distiller, got_loss: Tensor, wanted_loss: Tensor) -> None:
    got, wanted = gradients(distiller, got_loss), gradients(distiller, wanted_loss)
    assert wanted_loss.item() > 0
    assert got_loss.item() == pytest.approx(wanted_loss.item(), rel=1e-5)
    assert wanted.keys() == got.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name
