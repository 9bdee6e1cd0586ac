"""The student's side of training: what runs on every Ray Train worker.

One loop serves fine-tuning, distillation and the no-teacher baseline; they differ in the stream they read and in the
weights of the loss. The dropout of a micro-batch is a function of (seed, index), so no random state needs saving.
"""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import torch
from torch import Tensor

from raydistil import turns, wire
from raydistil.checkpoint import State
from raydistil.distiller import Distiller
from raydistil.ensemble import mixed_targets
from raydistil.errors import DivergedError
from raydistil.losses import LossOutputs, weights_at
from raydistil.manifest import Ledger, keyed
from raydistil.models import HeadedEncoder, load_model
from raydistil.optim import deepspeed_config, leave_out_bad_steps, linear_schedule, merged, parameter_groups
from raydistil.partitioned import announce, own_part
from raydistil.progress import Wish
from raydistil.report import Meter
from raydistil.resume import UNIVERSAL, resumed
from raydistil.roofline import gemm_rate
from raydistil.saving import Saver
from raydistil.specs import SaveSpec, WorkerSpec
from raydistil.steps import FILLER, Steps
from raydistil.student.training import made_for_training
from raydistil.tally import Used
from raydistil.targets import targets_for
from raydistil.trace import Record, Trace, trace_path
from raydistil.types import TrainSummary


class StudentWorker:
    """One worker: its engine, its share of the stream and its meter."""

    def __init__(self, spec: WorkerSpec, save: SaveSpec, progress: Any, rows: Iterator[pa.Table]) -> None:
        self._spec, self._save_spec, self._progress = spec, save, progress
        context = ray.train.get_context()
        self._rank, self._world = context.get_world_rank(), context.get_world_size()
        self._steps = Steps(spec.per_step, 0, spec.num_steps, self._world)
        turns.in_front()
        torch.set_num_threads(spec.threads)
        torch.manual_seed(spec.seed)
        self._rows = rows
        self._ledger = Ledger()
        config = deepspeed_config(spec.train, self._steps.accumulation)
        checkpoint, start = ray.get(progress.started.remote())
        self._saver = Saver(save.store, save.config, self._rank, self._world, start)
        with resumed(save.store, checkpoint, config["zero_optimization"]["stage"]) as before:
            if before:
                self._ledger, self._steps = before.state.ledger, replace(self._steps, first=before.state.steps)
            self._engine = self._make_engine(merged(config, UNIVERSAL) if before and before.universal else config)
            if before:
                before.load(self._engine)
        self._began_s, self._from_step = min(self._gathered([time.time()])), self._engine.global_steps
        self._device = torch.device(self._engine.device)
        self._turns = count()
        self._consumed: list[int] = []  # since the last checkpoint
        self._skipped = self._engine.skipped_steps
        self._loss, self._counted = torch.zeros((), device=self._device), 0  # its sum since then, over so many steps
        self._meter = Meter(
            self._rank, self._world, progress, spec.num_steps, self._steps.first, shared=spec.shares_cores,
            used=Used(spec.flops_per_token, partial(gemm_rate, spec.train.precision, self._device.type)),
        )  # fmt: skip
        self._trace = Trace(spec.traced and trace_path(*spec.traced, self._rank))

    def _make_engine(self, config: dict[str, Any]) -> Any:
        spec, model = self._spec, make_distiller(self._spec)
        made, *_ = _deepspeed().initialize(
            model=model,
            model_parameters=parameter_groups(model, spec.train.weight_decay),
            lr_scheduler=linear_schedule(spec.num_steps, spec.train.warmup_share),
            config=config,
            dist_init_required=False,
        )
        bound_waiting(spec.hang_timeout_s)
        if made.zero_optimization_stage() == 3:
            announce(model)
        leave_out_bad_steps(made)
        if self._world == 1 and not made.zero_optimization():
            made.enable_backward_allreduce = False  # it would copy all gradients twice, to add nothing to them
        return made

    def run(self) -> None:
        """Train on the whole stream, with checkpoints on the way and one at the end."""
        wish, summary = Wish.NONE, None
        self._saved_s = time.monotonic()
        for step in range(self._steps.first + 1, self._steps.last + 1):
            before = len(self._consumed)
            metrics = _mean_metrics([self._micro_step() for _ in range(self._steps.accumulation)])
            self._look_at_step(step, metrics["loss"], self._consumed[before:])
            epoch = step * self._spec.per_step / self._spec.per_epoch
            self._meter.step(step, epoch, metrics, self._engine.get_lr()[0])
            self._saver.look()
            wish = self._agreed(self._wish(step))
            if wish:
                summary = self._save(step, interrupted=wish == Wish.STOP and step < self._steps.last)
            if wish == Wish.STOP:
                break
        self._saver.wait()
        assert wish == Wish.STOP or self._ledger.done(self._spec.per_step) == self._steps.last
        if self._rank == 0 and summary is not None:
            saver, wall_s = self._saver, self._meter.wall_s
            summary = replace(summary, checkpoints=saver.count, saving_s=saver.held_s, wall_s=wall_s)
            ray.get(self._progress.finish.remote(summary))

    def _wish(self, step: int) -> Wish:
        """What is to be done after this step."""
        save, since = self._save_spec.config, step - self._steps.first
        by_steps = save.every_steps is not None and since % save.every_steps == 0
        by_time = time.monotonic() - self._saved_s > 60 * save.every_min
        due = step == self._steps.last or by_steps or by_time
        return Wish(max(self._meter.wish(), Wish.SAVE if due else Wish.NONE))

    def _micro_step(self) -> tuple[LossOutputs, int]:
        """Forward, backward and, at the end of an accumulation, the optimizer step on the next micro-batch.

        Returns its losses and the rows they are of.
        """
        asked = time.time()
        row, step = self._next(), self._engine.global_steps + 1
        started = time.time()
        batch = wire.batch_of(row)
        said = [
            targets_for(teacher.targets, columns, batch, self._device)
            for teacher, columns in zip(self._spec.teachers, wire.targets_of(row), strict=True)
        ]
        targets = mixed_targets(said, self._spec.weights, self._spec.loss) if said else None
        torch.manual_seed(int(keyed(self._spec.seed, batch.index) >> np.uint64(1)))
        out: LossOutputs = self._engine(batch, targets, weights_at(self._spec.loss, self._share_done()))
        weight = batch.num_rows / self._spec.mean_rows * self._steps.weight
        self._engine.backward(out.loss * (weight + 0 * out.loss.detach()))  # no number, no gradient
        self._engine.step()
        self._consumed += [batch.index] if batch.index != FILLER else []
        taught = tuple(wire.timings_of(row, batch.num_tokens))
        figures = (batch.index, batch.num_rows, batch.num_tokens, row.nbytes)
        record = Record(step, *figures, asked, started, time.time(), taught, self._began_s, self._from_step)
        self._meter.micro_step(record)
        self._trace.add(record)
        return out, batch.num_rows

    def _next(self) -> pa.Table:
        """The next micro-batch of this worker, which no other one may stand for. Raises RuntimeError otherwise."""
        row, turn = next(self._rows, None), next(self._turns)
        (expected,) = self._steps.given(self._rank, np.array([turn]))
        if row is None or row["index"][0].as_py() != expected:
            got = "the end of the stream" if row is None else f"micro-batch {row['index'][0].as_py()}"
            raise RuntimeError(f"expected micro-batch {expected} at turn {turn} of worker {self._rank}, got {got}")
        return row

    def _share_done(self) -> float:
        """Share of the optimizer steps that are done; 1 in the last one."""
        done: int = self._engine.global_steps
        return float(min(1.0, done / max(1, self._steps.last - 1)))

    def _look_at_step(self, step: int, loss: Tensor, own: list[int]) -> None:
        """Add its loss; or name what was in it, if DeepSpeed has skipped it. Raises DivergedError for one too many."""
        if self._engine.skipped_steps == self._skipped:
            self._loss, self._counted = self._loss + loss, self._counted + 1
            return
        self._skipped, most = self._engine.skipped_steps, self._spec.train.max_skipped_steps
        indices = ", ".join(map(str, sorted(self._gathered(own))))
        where = f"step {step} of {self._steps.last} (micro-batches {indices})"
        if self._skipped > most:
            raise self._diverged(f"got nan or inf in {where}, after {most} that were skipped")
        if self._rank == 0:
            self._progress.tell.remote(f"the loss or its gradient is nan or inf in {where}: skipped")

    def _check_weights(self, step: int) -> None:
        """Raise DivergedError for weights, about to be saved, that are no numbers any more."""
        trained = (part for part in self._engine.module.parameters() if part.requires_grad)
        if not all(self._gathered([all(bool(own_part(part).isfinite().all()) for part in trained)])):
            raise self._diverged(f"got weights that are nan or inf by step {step} of {self._steps.last}")

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"expected a finite loss, {what}: lower lr (it was {self._spec.train.lr:g}), or use precision float32, and "
            f"give the run another name; the last checkpoint is as it was"
        )

    def _agreed(self, wish: Wish) -> Wish:
        """Rank 0's, on every worker."""
        if self._world == 1:
            return wish
        tensor = torch.tensor([int(wish)], device=self._device)
        torch.distributed.broadcast(tensor, src=0)
        return Wish(int(tensor.item()))

    def _save(self, step: int, interrupted: bool) -> TrainSummary:
        self._check_weights(step)
        self._ledger = self._ledger.adding(self._gathered(self._consumed))
        losses = self._gathered([self._loss.item() / self._counted if self._counted else math.inf])
        self._consumed, self._loss, self._counted = [], torch.zeros_like(self._loss), 0
        summary, save = self._meter.summary(interrupted, self._skipped), self._save_spec
        state = State(
            self._ledger, self._spec.per_step, self._world, sum(losses) / len(losses), save.run_hash, save.run_config,
            summary, files={},
        )  # fmt: skip
        self._saver.save(self._engine, self._spec.tokenizer, state)
        self._saved_s = time.monotonic()
        return summary

    def _gathered(self, own: list[Any]) -> list[Any]:
        """Those of all workers, rank by rank."""
        if self._world == 1:
            return own
        lists: list[list[Any]] = [[] for _ in range(self._world)]
        torch.distributed.all_gather_object(lists, own)
        return [value for part in lists for value in part]


def make_distiller(spec: WorkerSpec) -> Distiller:
    """The student of `spec` with its losses, on this process's device, in training mode."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = made_for_training(load_model(spec.init, spec.task, spec.labels), spec.train.dropout, device)
    if spec.train.freeze_embeddings:
        loaded.get_input_embeddings().requires_grad_(False)
    encoder = HeadedEncoder(loaded, spec.task, spec.train.precision)
    teacher: Any = load_model(spec.teachers[0].model, spec.task) if spec.frozen_teacher else None
    distiller = Distiller(encoder, spec.loss, spec.layers, spec.seed, teacher and teacher.to(device))
    distiller.project(spec.teacher_width)
    return distiller.train()


def _deepspeed() -> Any:
    """DeepSpeed, told not to compile its shared-memory collectives: that takes a minute and can hang later runs."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def bound_waiting(seconds: float) -> None:
    """Of all process groups there are: those that DeepSpeed makes for itself would wait for half an hour."""
    from torch.distributed import distributed_c10d

    if torch.distributed.is_initialized():
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def _mean_metrics(outs: list[tuple[LossOutputs, int]]) -> dict[str, Tensor]:
    """Over the micro-batches of rows that count, where there are any."""
    counted = [out.metrics for out, rows in outs if rows] or [outs[0][0].metrics]
    return {name: torch.stack([metrics[name] for metrics in counted]).mean() for name in counted[0]}
