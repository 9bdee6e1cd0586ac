"""The chain: prepare -> finetune -> distill -> evaluate -> export. Each stage leaves its result in the run's directory
and is skipped where that is there already, so a run goes on where it stopped."""

import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray

from raydistil import rundir
from raydistil.cache.inputs import inputs_of
from raydistil.cache.sizes import cache_spec, sizes_of
from raydistil.cluster import cluster
from raydistil.config import Config, EvaluateConfig, TrainConfig, result_hash
from raydistil.config.loss import LossConfig
from raydistil.config.targets import TargetsConfig
from raydistil.errors import ConfigError, unwrapped
from raydistil.export import export
from raydistil.layers import plan_layers
from raydistil.manifest import Manifest
from raydistil.models import load_model, resolve, shape_of
from raydistil.plan import cores, threads
from raydistil.prepare import Prepared, Say, needs, prepare
from raydistil.specs import (
    Candidate,
    EvaluateSpec,
    ModelReport,
    SourceSpec,
    TeacherSpec,
    TrainRun,
    WorkerSpec,
)  # fmt: skip
from raydistil.storage import whole_directory
from raydistil.student import build_student, save_model
from raydistil.targets import makes_logits, targets_spec

LABELS_ONLY = LossConfig(kd=0, task=1, cosine=0)


# ---- training stages


def finetune(run: Prepared) -> None:
    """Teach the teacher the task (or, with task mlm, the corpus): run_dir/teacher."""
    assert run.config.finetune is not None
    init = resolve(run.config.teacher.model)
    _train(run, "finetune", run.config.finetune, LABELS_ONLY, init, rundir.TEACHER)


def distill(run: Prepared) -> None:
    """Build the student and teach it what the teacher says: run_dir/distilled."""
    assert run.config.distill is not None
    config = run.config.distill
    init, variants = _student_init(run), run.config.variants
    _train(run, "distill", config, config.loss, init, rundir.DISTILLED, config.targets, variants=variants)


def _score(spec: EvaluateSpec, candidates: list[Candidate]) -> list[ModelReport]:
    """Runs as a Ray task, where the accelerators are."""
    from raydistil.evaluate import evaluate as score

    return score(spec, candidates)


def train_baseline(run: Prepared) -> None:
    """The same student (same start, batch size, masks and number of steps) on the labels alone.

    Where some rows have no label it goes round the others more often.
    """
    distill = run.config.distill
    assert distill is not None
    rows, labelled = (sum(run.store.bucket_rows("train", only)) for only in (False, run.config.task != "mlm"))
    epochs = math.ceil(distill.epochs * rows / labelled) + 1  # the last of them is cut short
    config = distill.model_copy(update={"lr": _baseline_lr(run.config), "epochs": epochs})
    steps = _num_slots(run, _manifest(run, distill, with_teacher=True), distill)
    name = _no_teacher(run.config)
    variants = run.config.variants
    _train(run, name, config, LABELS_ONLY, _student_init(run), name, num_slots=steps, variants=variants)


def _baseline_lr(config: Config) -> float:
    assert config.distill is not None
    return (config.evaluate and config.evaluate.baseline_lr) or config.distill.lr


def _no_teacher(config: Config) -> str:
    """Its stage and directory: one for each learning rate, so that several can be tried."""
    return f"{rundir.NO_TEACHER}-{_baseline_lr(config):g}"


def _student_init(run: Prepared) -> str:
    """The directory of the untrained student, written once."""
    path = run.run_dir / rundir.STUDENT_INIT
    if not path.exists():
        import torch

        torch.manual_seed(run.config.seed)
        start = run.config.teacher.model if run.config.student.start == "checkpoint" else run.teacher_dir
        teacher = load_model(start, run.config.task, run.labels)
        with whole_directory(path) as scratch:
            save_model(build_student(teacher, run.config.student, run.config.task), run.teacher_dir, scratch)
    return str(path)


def _manifest(run: Prepared, config: TrainConfig, with_teacher: bool) -> Manifest:
    """All rows where there is a teacher; without one, what has no label cannot be learned from."""
    labelled = run.config.task == "classification" and not with_teacher
    rows = run.store.bucket_rows("train", labelled)
    return Manifest(rows, config.epochs, config.micro_batch_size, run.config.seed)


def _num_slots(run: Prepared, manifest: Manifest, config: TrainConfig) -> int:
    return manifest.padded_to(run.config.cluster.students * config.accumulation)


def _train(
    run: Prepared, stage: str, train_config: TrainConfig, loss: LossConfig, init: str, target: str,
    targets: TargetsConfig | None = None, num_slots: int | None = None, variants: int | None = None,
) -> None:  # fmt: skip
    """One training run, unless its model is there already; `num_slots` micro-batches, else every epoch to its end.

    `targets`: how the teacher's come; None: without a teacher. `variants`: see SourceSpec.
    """
    from raydistil.train import train

    if (run.run_dir / target).exists():
        run.say(f"{stage}: done before, kept in {run.run_dir / target}")
        return
    config = run.config
    manifest = _manifest(run, train_config, targets is not None)
    slots = num_slots or _num_slots(run, manifest, train_config)
    worker = _worker(run, train_config, loss, init, targets, slots, manifest.per_epoch)
    masking = config.masking if config.task == "mlm" else None
    source = SourceSpec(run.store.path, "train", manifest, masking, variants)
    if worker.teacher is not None and targets is not None and targets.cache is not None:
        source = _kept(run, targets.cache, worker.teacher, source)
    summary = train(TrainRun(stage, source, worker, config.cluster, run.run_dir), run.run_dir / target)
    rundir.write_summary(run.run_dir, stage, summary, {"rows": manifest.num_rows, "lr": train_config.lr})
    run.say(_describe(stage, summary, kept=source.cache is not None))


def _kept(run: Prepared, root: Path, teacher: TeacherSpec, source: SourceSpec) -> SourceSpec:
    """`source` with the teacher's targets of all its micro-batches, made here as far as they are not there."""
    from raydistil.fill import fill_cache

    shape = shape_of(teacher.model, "teacher.model")
    classes = len(run.labels) or shape.vocab_size
    sizes = sizes_of(teacher.targets, source.masking, shape.hidden_size, classes)
    inputs = inputs_of(teacher, source)
    cache = cache_spec(root, inputs, teacher.targets, source, sizes)
    tokens = run.store.meta.splits[source.split].tokens
    filled = fill_cache(cache, inputs, source, teacher, sizes, tokens, run.config.cluster, run.say)
    rundir.write_json(run.run_dir / rundir.TARGETS, asdict(filled) | {"bytes_per_token": filled.bytes_per_token})
    return replace(source, cache=cache)


def _worker(
    run: Prepared, train_config: TrainConfig, loss: LossConfig, init: str, targets: TargetsConfig | None,
    num_slots: int, per_epoch: int,
) -> WorkerSpec:  # fmt: skip
    """What every student worker is given; the teacher with it."""
    config = run.config
    cached = targets is not None and targets.cache is not None
    student_threads, teacher_threads = threads(config.cluster, targets is not None, cached)
    student = shape_of(init, "student.model")
    teacher = student if targets is None else shape_of(run.teacher_dir, "teacher.model")
    head = targets is not None and makes_logits(targets, loss, config.task)
    layers = plan_layers(loss, config.task, head, teacher.num_hidden_layers, student.num_hidden_layers)
    spec = None
    if targets is not None:
        wanted = targets_spec(targets, loss, config.task, layers, config.seed)
        spec = TeacherSpec(run.teacher_dir, config.task, config.teacher.precision, teacher_threads, wanted)
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


# ---- evaluation and export


def evaluate(run: Prepared) -> dict[str, Any]:
    """Score teacher, student and whatever was asked to stand beside them; returns the report and writes it."""
    config, wanted = run.config, run.config.evaluate
    assert wanted is not None
    if wanted.no_teacher_baseline:
        train_baseline(run)
    spec = EvaluateSpec(
        config.task, run.store.path, "test", config.masking if config.task == "mlm" else None, run.labels,
        config.teacher.precision, wanted, cores(),
    )  # fmt: skip
    score = ray.remote(num_cpus=1, num_gpus=config.cluster.student_gpus)(_score)
    try:
        rows = ray.get(score.remote(spec, _candidates(run, wanted)))
    except ray.exceptions.RayTaskError as error:
        raise unwrapped(error) from error
    report = build_report(run, {row.name: row for row in rows})
    if wanted.no_teacher_baseline:
        report["stages"]["no-teacher"] = rundir.read_summary(run.run_dir, _no_teacher(config))
    rundir.write_json(run.run_dir / rundir.REPORT, report)
    return report


def _candidates(run: Prepared, config: EvaluateConfig) -> list[Candidate]:
    """What stands in the table: teacher and student, and what the configuration wants beside them."""
    found = [Candidate("teacher", run.teacher_dir, True), _candidate(run, "student", rundir.DISTILLED, True)]
    if run.config.task == "mlm":
        found.append(_candidate(run, "untrained", rundir.STUDENT_INIT, False))
    if config.no_teacher_baseline:
        found.append(_candidate(run, "no_teacher", _no_teacher(run.config), False))
    return found


def _candidate(run: Prepared, name: str, folder: str, timed: bool) -> Candidate:
    path = run.run_dir / folder
    if not path.exists():
        raise ConfigError(f"expected a model at {path}, found none: run distill first")
    return Candidate(name, str(path), timed)


def build_report(run: Prepared, rows: dict[str, Any]) -> dict[str, Any]:
    """The one JSON object of a run: flat figures first, then what they were made from."""
    teacher, student = rows["teacher"], rows["student"]
    report: dict[str, Any] = {f"{name}_score": row.score.value for name, row in rows.items()}
    report |= {f"{name}_mlm_loss": row.mlm_loss for name, row in rows.items() if row.mlm_loss is not None}
    report |= {
        "metric": teacher.score.metric,
        "retention": student.score.value / teacher.score.value if teacher.score.value else None,
        "teacher_params": teacher.parameters,
        "student_params": student.parameters,
        "speedup": teacher.latency_p50_ms / student.latency_p50_ms,
        "student_dir": str(run.run_dir / rundir.STUDENT),
        "seed": run.config.seed,
        "config_hash": result_hash(run.config),
        "models": [asdict(row) for row in rows.values()],
        "stages": {stage: rundir.read_summary(run.run_dir, stage) for stage in ("finetune", "targets", "distill")},
    }
    return report


def run_all(config: Config, say: Say) -> dict[str, Any]:
    """The whole chain as the configuration has it. Returns the report, with `wall_s`."""
    started = time.time()
    run = prepare(config, say)
    with cluster(config.cluster, needs(config)):
        report = _stages(run)
    if config.distill:
        export(config, run.run_dir, report)
    report["wall_s"] = round(time.time() - started, 1)
    rundir.write_json(run.run_dir / rundir.REPORT, report)
    return report


def _stages(run: Prepared) -> dict[str, Any]:
    if run.config.finetune:
        finetune(run)
    if run.config.distill:
        distill(run)
    return evaluate(run) if run.config.evaluate else {}


def run_stage(config: Config, stage: str, say: Say) -> dict[str, Any]:
    """One stage of the chain; the ones before it must have left their results."""
    _check_stage(config, stage)
    run = prepare(config, say)
    if stage == "export":
        return {"student_dir": str(export(config, run.run_dir, rundir.read_report(run.run_dir)))}
    work = {"finetune": finetune, "distill": distill, "evaluate": evaluate}[stage]
    if stage in ("distill", "evaluate") and config.finetune and not Path(run.teacher_dir).exists():
        raise ConfigError(f"expected a fine-tuned teacher at {run.teacher_dir}, found none: run finetune first")
    with cluster(config.cluster, needs(config)):
        return work(run) or {"stage": stage, **(rundir.read_summary(run.run_dir, stage) or {})}


def _check_stage(config: Config, stage: str) -> None:
    """Raise ConfigError for a stage the configuration says nothing of."""
    needed = {"finetune": config.finetune, "distill": config.distill, "evaluate": config.evaluate}
    if needed.get(stage, True) is None:
        raise ConfigError(f"expected a section [{stage}] to run that stage, found none: add it to the file")
