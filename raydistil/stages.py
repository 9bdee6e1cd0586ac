"""One training of the chain: what flows, what the worker is made of, whether the teacher speaks or its kept word."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from raydistil import rundir
from raydistil.cache.inputs import inputs_of
from raydistil.cache.sizes import cache_spec, sizes_of
from raydistil.chain import Link
from raydistil.config import TrainConfig
from raydistil.config.loss import LossConfig
from raydistil.config.targets import variants_of
from raydistil.layers import plan_layers
from raydistil.manifest import Manifest
from raydistil.models import resolve, shape_of
from raydistil.plan import threads
from raydistil.prepare import Prepared
from raydistil.specs import SourceSpec, TeacherSpec, TrainRun, WorkerSpec
from raydistil.targets import makes_logits, targets_spec


def manifest_of(run: Prepared, config: TrainConfig, with_teacher: bool) -> Manifest:
    """All rows where there is a teacher; without one, what has no label cannot be learned from."""
    labelled = run.config.task == "classification" and not with_teacher
    rows = run.store.bucket_rows("train", labelled)
    return Manifest(rows, config.epochs, config.micro_batch_size, run.config.seed)


def num_slots(run: Prepared, manifest: Manifest, config: TrainConfig) -> int:
    """Micro-batches of a whole training, with empty ones that make it a multiple of a step's."""
    return manifest.padded_to(run.config.cluster.students * config.accumulation)


def train_stage(
    run: Prepared, stage: str, train_config: TrainConfig, loss: LossConfig, init: str, target: str,
    link: Link | None = None, slots: int | None = None, variants: int | None = None,
) -> None:  # fmt: skip
    """One training, unless its model is there already; `slots` micro-batches, else every epoch to its end.

    `link`: whose teacher speaks; None: without a teacher. `variants`: see SourceSpec.
    """
    from raydistil.train import train

    if (run.run_dir / target).exists():
        run.say(f"{stage}: done before, kept in {run.run_dir / target}")
        return
    manifest = manifest_of(run, train_config, link is not None)
    slots = slots or num_slots(run, manifest, train_config)
    worker = _worker(run, train_config, loss, init, link, slots, manifest.per_epoch)
    source = _source(run, manifest, link, worker.teacher, variants)
    summary = train(TrainRun(stage, source, worker, run.config.cluster, run.run_dir), run.run_dir / target)
    figures = asdict(summary) | {"rows": manifest.num_rows, "lr": train_config.lr}
    rundir.write_summary(run.run_dir, stage, figures)
    run.say(_describe(stage, summary, kept=source.cache is not None))


def _source(
    run: Prepared, manifest: Manifest, link: Link | None, teacher: TeacherSpec | None, variants: int | None
) -> SourceSpec:
    """The micro-batches, and the teacher's targets of all of them where they are to be kept."""
    masking = run.config.masking if run.config.task == "mlm" else None
    if link is None:
        return SourceSpec(run.store.path, "train", manifest, masking, variants=variants)
    targets = link.train.targets
    source = SourceSpec(run.store.path, "train", manifest, masking, link.train.augment, variants_of(targets))
    return source if teacher is None or targets.cache is None else _kept(run, link, targets.cache, teacher, source)


def _kept(run: Prepared, link: Link, root: Path, teacher: TeacherSpec, source: SourceSpec) -> SourceSpec:
    """`source` with the teacher's targets of all its micro-batches, made here as far as they are not there."""
    from raydistil.fill import fill_cache

    shape = shape_of(teacher.model, "teacher.model")
    classes = len(run.labels) or shape.vocab_size
    sizes = sizes_of(teacher.task, teacher.targets, run.config.masking.share, shape.hidden_size, classes)
    inputs = inputs_of(teacher, source)
    cache = cache_spec(root, inputs, teacher.targets, source, sizes)
    tokens = run.store.meta.splits[source.split].tokens
    filled = fill_cache(cache, inputs, source, teacher, sizes, tokens, run.config.cluster, run.say)
    figures = asdict(filled) | {"bytes_per_token": filled.bytes_per_token}
    rundir.write_summary(run.run_dir, rundir.targets_of(link.stage), figures)
    return replace(source, cache=cache)


def _worker(
    run: Prepared, train_config: TrainConfig, loss: LossConfig, init: str, link: Link | None, num_slots: int,
    per_epoch: int,
) -> WorkerSpec:  # fmt: skip
    """What every student worker is given; the teacher with it."""
    config = run.config
    cached = link is not None and link.train.targets.cache is not None
    student_threads, teacher_threads = threads(config.cluster, link is not None, cached)
    student = shape_of(init, "student.model")
    teacher = student if link is None else shape_of(link.teacher, "teacher.model")
    head = link is not None and makes_logits(link.train.targets, loss, config.task)
    layers = plan_layers(loss, config.task, head, teacher.num_hidden_layers, student.num_hidden_layers)
    spec = None
    if link is not None and (layers.teacher_states or loss.kd):
        wanted = targets_spec(link.train.targets, loss, config.task, layers, config.seed)
        spec = TeacherSpec(link.teacher, config.task, config.teacher.precision, teacher_threads, wanted)
    return WorkerSpec(
        task=config.task, init=init, tokenizer=resolve(config.teacher.model), teacher=spec,
        frozen_teacher=head or bool(layers.attention_layers[0]), teacher_width=teacher.hidden_size,
        layers=layers, labels=run.labels, train=train_config, loss=loss, seed=config.seed, threads=student_threads,
        per_epoch=per_epoch, num_slots=num_slots,
    )  # fmt: skip


def _describe(stage: str, summary: Any, kept: bool) -> str:
    text = f"{stage}: {summary.steps} steps, {summary.tokens:,} tokens in {summary.wall_s:.0f} s"
    if summary.teacher_builds:
        both = summary.overlap_s / max(summary.student_busy_s, 1e-9)
        text += (
            f"; teacher built {summary.teacher_builds}x, at work during {both:.0%} of the student's time, "
            f"student waited {summary.wait_s / max(summary.wall_s, 1e-9):.0%}"
        )
    elif kept:
        text += f"; teacher built 0x, student waited {summary.wait_s / max(summary.wall_s, 1e-9):.0%}"
    return text
