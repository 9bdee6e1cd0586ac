"""A few steps of the first distillation of a run, here and now: how fast a teacher and a student are, each for itself.

What is timed is what a run is made of: the actor's own class, with its threads, and the student with its losses and
optimizer on targets as they cross the wire. Nothing is kept, and no Ray process is started.
"""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor, nn

from raydistil import wire
from raydistil.chain import links, teacher_models
from raydistil.config import Config
from raydistil.config.train import TrainConfig
from raydistil.ensemble import mixed_targets
from raydistil.losses import weights_at
from raydistil.models import load_model
from raydistil.optim import cut, parameter_groups
from raydistil.pipeline import lesson
from raydistil.prepare import Prepared, prepare
from raydistil.source import MicroBatches
from raydistil.specs import TrainRun
from raydistil.stages import train_run
from raydistil.storage import scratch_directory
from raydistil.student import save_model
from raydistil.tally import BUSY, WAITS
from raydistil.targets import targets_for
from raydistil.teacher import Teacher
from raydistil.types import TeacherTiming, TokenBatch, Verdict
from raydistil.worker import make_distiller

STEPS = 20
WARM_UP = 2  # steps that are not counted


@dataclass(frozen=True, slots=True)
class Probe:
    """Real tokens a second of one teacher (of each, where there are several: they are pools apart) and one student."""

    steps: int  # that were counted
    teacher_tok_s: float
    student_tok_s: float
    bytes_per_token: float  # over the wire
    shared: bool  # whether teachers and students have the same cores, each of them all while it is timed

    def verdict(self, teachers: int, students: int) -> Verdict:
        """With so many of them, each as fast as the one here."""
        if self.shared:
            return "balanced"
        share = self.student_tok_s * students / (self.teacher_tok_s * teachers)  # of the teachers' time
        if share > 1 / (1 - WAITS):
            return "teacher-bound"
        return "student-bound" if share < BUSY else "balanced"

    def tok_s(self, teachers: int, students: int) -> float:
        taught, trained = self.teacher_tok_s * teachers, self.student_tok_s * students
        return 1 / (1 / taught + 1 / trained) if self.shared else min(taught, trained)


class Loop(ABC):
    """A model that learns from micro-batches in this process, round and round."""

    def __init__(self, model: nn.Module, train: TrainConfig) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device)
        self._clip = train.clip
        groups = parameter_groups(self.model, train.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)

    @abstractmethod
    def losses(self) -> tuple[Tensor, int]:
        """(loss of the next micro-batch, its real tokens)."""

    def step(self) -> int:
        """One optimizer step; returns the real tokens it was made of."""
        loss, tokens = self.losses()
        loss.backward()  # type: ignore[no-untyped-call]
        cut(self._optimizer, self.model, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return tokens

    def rate(self, steps: int) -> float:
        """Real tokens a second over that many steps."""
        self._wait()
        started = time.perf_counter()
        tokens = sum(self.step() for _ in range(steps))
        self._wait()
        return tokens / (time.perf_counter() - started)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class StudentOnly(Loop):
    """The student alone, on targets that wait in memory. `rows`: as the last teacher's actor gave them."""

    def __init__(self, planned: TrainRun, rows: list[pa.Table]) -> None:
        self._worker = planned.worker
        super().__init__(make_distiller(self._worker), self._worker.train)
        self._weights = weights_at(self._worker.loss, 0.0)
        self._rows = cycle(rows)

    def losses(self) -> tuple[Tensor, int]:
        row = next(self._rows)
        batch, teachers = wire.batch_of(row), self._worker.teachers
        said = [
            targets_for(teacher.targets, columns, batch, self.device)
            for teacher, columns in zip(teachers, wire.targets_of(row), strict=True)
        ]
        targets = mixed_targets(said, self._worker.weights, self._worker.loss) if said else None
        loss: Tensor = self.model(batch, targets, self._weights).loss
        return loss, batch.num_tokens


def taught(planned: TrainRun, batches: list[TokenBatch]) -> list[pa.Table]:
    """`batches` with the targets of every teacher, a row of `wire` each."""
    table = wire.table_of(batches)
    for spec in planned.worker.teachers:
        table = pa.concat_tables(Teacher(spec)(table))
    return [table.slice(number, 1) for number in range(table.num_rows)]


def probe(config: Config, max_rows: int) -> Probe | None:
    """Of the first `max_rows` texts; None where nothing is distilled, or no teacher has anything to say."""
    if config.distill is None:
        return None
    with scratch_directory() as folder:
        run = prepare(_small(config, folder, max_rows), lambda line: None)
        planned = _planned(run)
        if not planned.worker.teachers:
            return None
        if config.distill.targets.cache is not None:
            planned = _whole_states(planned)
        source = MicroBatches(planned.source)
        count = min(WARM_UP + STEPS, planned.source.manifest.num_micro_batches)
        return _timed(planned, [source.make(index) for index in range(count)])


def _small(config: Config, folder: Path, max_rows: int) -> Config:
    """What is timed of `config`: a part of its texts, in a directory of its own, with no targets kept."""
    assert config.distill is not None
    corpus = config.corpus.model_copy(update={"max_rows": min(max_rows, config.corpus.max_rows or max_rows)})
    targets = config.distill.targets.model_copy(update={"cache": None})
    changes = {"output_dir": folder, "corpus": corpus, "evaluate": None}
    return config.model_copy(update=changes | {"distill": config.distill.model_copy(update={"targets": targets})})


def _planned(run: Prepared) -> TrainRun:
    """The first link, its teachers as they are before any fine-tuning: they are as fast."""
    if run.config.finetune:
        for model, path in zip(teacher_models(run.config), run.teacher_dirs, strict=True):
            save_model(load_model(model, run.config.task, run.labels), run.config.teacher.model, Path(path))
    first = next(links(run.config, run.teacher_dirs, run.run_dir))
    return train_run(run, lesson(run, first.ungeneral()))


def _whole_states(planned: TrainRun) -> TrainRun:
    """With the states of all tokens, as a cache has them."""
    specs = [replace(spec, targets=replace(spec.targets, compared=False)) for spec in planned.worker.teachers]
    return replace(planned, worker=replace(planned.worker, teachers=tuple(specs)))


def _timed(planned: TrainRun, batches: list[TokenBatch]) -> Probe:
    rows = taught(planned, batches)
    counted = rows[WARM_UP:] or rows
    timings = [wire.timings_of(row, wire.batch_of(row).num_tokens) for row in counted]
    slowest = max(_span(pool) for pool in zip(*timings, strict=True))
    tokens = sum(said[0].tokens for said in timings)
    worker = planned.worker
    torch.set_num_threads(worker.threads)
    student = StudentOnly(planned, rows)
    student.rate(WARM_UP)
    num_bytes = sum(row.nbytes for row in counted)
    return Probe(len(counted), tokens / slowest, student.rate(len(counted)), num_bytes / tokens, worker.shares_cores)


def _span(timings: tuple[TeacherTiming, ...]) -> float:
    """Seconds from the first start to the last end."""
    return max(timing.ended_s for timing in timings) - min(timing.started_s for timing in timings)
