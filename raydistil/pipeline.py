"""The chain: prepare -> finetune -> distill -> evaluate -> export. Each stage leaves its result in the run's directory
and is skipped where that is there already, so a run goes on where it stopped."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray

from raydistil import rundir
from raydistil.chain import Link, assistants, links, teacher_models, weights_of
from raydistil.cluster import cluster
from raydistil.config import Config, EvaluateConfig, ExportConfig, result_hash
from raydistil.config.loss import LossConfig
from raydistil.config.targets import variants_of
from raydistil.errors import ConfigError, unwrapped
from raydistil.export import export, run_config
from raydistil.export.push import Repository, push
from raydistil.manifest import keyed
from raydistil.models import load_model, resolve
from raydistil.plan import cores
from raydistil.prepare import Prepared, Say, needs, prepare, reopened
from raydistil.specs import Candidate, EvaluateSpec, ModelReport
from raydistil.stages import Training, manifest_of, train_stage
from raydistil.storage import whole_directory
from raydistil.student import build_student, save_model, take_layers
from raydistil.types import Format, Vocabulary, takes_labels

LABELS_ONLY = LossConfig(kd=0, task=1, cosine=0)


# ---- training stages


def finetune(run: Prepared) -> None:
    """Teach the teachers the task (or, if they are language models, the corpus): run_dir/teacher.

    Each of an ensemble has a seed of its own, so that the same checkpoint may stand in it twice.
    """
    config = run.config.finetune
    assert config is not None
    for number, model in enumerate(teacher_models(run.config)):
        stage, target = (rundir.numbered(name, number) for name in ("finetune", rundir.TEACHER))
        seed = run.config.seed if number == 0 else int(keyed(run.config.seed, number) >> np.uint64(33))
        train_stage(run, Training(stage, config, LABELS_ONLY, resolve(model), target, seed))


def distill(run: Prepared) -> None:
    """Build the student and teach it what the teacher says, over assistants if there are any: run_dir/distilled."""
    for link in links(run.config, run.teacher_dirs, run.run_dir):
        for part in (link.general, link):
            if part is not None:
                train_stage(run, lesson(run, part))


def lesson(run: Prepared, link: Link) -> Training:
    """What is to be trained for `link`, from its student's start on."""
    init = _student_init(run, link)
    return Training(link.stage, link.train, link.train.loss, init, link.target, run.config.seed, link)


def _score(spec: EvaluateSpec, candidates: list[Candidate]) -> list[ModelReport]:
    """Runs as a Ray task, where the accelerators are."""
    from raydistil.evaluate import evaluate as score

    return score(spec, candidates)


def train_baseline(run: Prepared) -> None:
    """The same student (same layers, batch size, masks and number of steps) on the labels alone.

    It starts without a general distillation, which has a teacher too. Where some rows have no label it goes round the
    others more often.
    """
    distill = run.config.distill
    assert distill is not None
    seed, name = run.config.seed, _no_teacher(run.config)
    count = manifest_of(run, distill, True, seed).num_micro_batches
    epochs = math.ceil(count / manifest_of(run, distill, False, seed).per_epoch)  # the last of them is cut short
    config = distill.model_copy(update={"lr": _baseline_lr(run.config), "epochs": epochs})
    *_, last = links(run.config, run.teacher_dirs, run.run_dir)
    init, variants = _student_init(run, last.ungeneral()), variants_of(distill.targets)
    train_stage(run, Training(name, config, LABELS_ONLY, init, name, seed, micro_batches=count, variants=variants))


def _baseline_lr(config: Config) -> float:
    assert config.distill is not None
    return (config.evaluate and config.evaluate.baseline_lr) or config.distill.lr


def _no_teacher(config: Config) -> str:
    """Its stage and directory: one for each learning rate, so that several can be tried."""
    return f"{rundir.NO_TEACHER}-{_baseline_lr(config):g}"


def _student_init(run: Prepared, link: Link) -> str:
    """The directory of the student of `link` before its training (but after any general one), written once."""
    path = run.run_dir / link.init
    if not path.exists():
        import torch

        torch.manual_seed(run.config.seed)
        teacher = load_model(link.teacher, run.config.task, run.labels)
        if link.student.start == "checkpoint":
            take_layers(teacher, load_model(link.untuned, run.config.task, run.labels))
        student = build_student(teacher, link.student, run.config.task)
        if link.general is not None:
            take_layers(student, load_model(str(run.run_dir / link.general.target), run.config.task, run.labels))
        with whole_directory(path) as scratch:
            save_model(student, link.teacher, scratch)
    return str(path)


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
    rows = score(config, spec, _candidates(run, wanted))
    report = build_report(run, {row.name: row for row in rows})
    if wanted.no_teacher_baseline:
        report["stages"]["no-teacher"] = rundir.read_summary(run.run_dir, _no_teacher(config))
    rundir.write_json(run.run_dir / rundir.REPORT, report)
    return report


def score(config: Config, spec: EvaluateSpec, candidates: list[Candidate]) -> list[ModelReport]:
    """Score models where the accelerators are."""
    on = config.cluster.student_label_selector
    remote = ray.remote(num_cpus=1, num_gpus=config.cluster.student_gpus, label_selector=on)(_score)
    try:
        found: list[ModelReport] = ray.get(remote.remote(spec, candidates))
    except ray.exceptions.RayTaskError as error:
        raise unwrapped(error) from error
    return found


def _candidates(run: Prepared, config: EvaluateConfig) -> list[Candidate]:
    """What stands in the table: teacher and student, and what the configuration wants beside them."""
    found = [teacher_of(run, True), _candidate(run, "student", rundir.DISTILLED, True)]
    if not takes_labels(run.config.task):
        found.append(_candidate(run, "untrained", rundir.STUDENT_INIT, False))
    found += [_candidate(run, name, name, True) for _, _, name in assistants(run.config)]
    if config.no_teacher_baseline:
        found.append(_candidate(run, "no_teacher", _no_teacher(run.config), False))
    return found


def _candidate(run: Prepared, name: str, folder: str, timed: bool) -> Candidate:
    path = run.run_dir / folder
    if not path.exists():
        raise ConfigError(f"expected a model at {path}, found none: run distill first")
    return Candidate(name, (str(path),), (1.0,), timed)


def teacher_of(run: Prepared, timed: bool) -> Candidate:
    """The teacher, or all of them as one."""
    return Candidate("teacher", run.teacher_dirs, weights_of(run.config), timed)


def build_report(run: Prepared, rows: dict[str, Any]) -> dict[str, Any]:
    """The one JSON object of a run: flat figures first, then what they were made from."""
    teacher, student = rows["teacher"], rows["student"]
    report: dict[str, Any] = {f"{name}_score": row.score.value for name, row in rows.items()}
    for figure in ("mlm_loss", "clm_loss", "perplexity", "pearson", "rmse", "accuracy", "exact_match"):
        found = {f"{name}_{figure}": getattr(row, figure) for name, row in rows.items()}
        report |= {name: value for name, value in found.items() if value is not None}
    report |= {
        "metric": teacher.score.metric,
        "retention": student.score.value / teacher.score.value if teacher.score.value else None,
        "teacher_params": teacher.parameters,
        "student_params": student.parameters,
        "teacher_flops_per_token": teacher.flops_per_token,
        "student_flops_per_token": student.flops_per_token,
        "speedup": teacher.latency_p50_ms / student.latency_p50_ms,
        "student_dir": str(run.run_dir / rundir.STUDENT),
        "seed": run.config.seed,
        "config_hash": result_hash(run.config),
        "models": [asdict(row) for row in rows.values()],
        "stages": {stage: rundir.read_summary(run.run_dir, stage) for stage in _stage_names(run.config)},
    }
    return report


def _stage_names(config: Config) -> list[str]:
    """In the order of the work."""
    teachers = range(1 + len(config.ensemble))
    names = [rundir.numbered("finetune", number) for number in teachers]
    if config.distill is None:
        return names
    kept, general = config.distill.targets.cache is not None, config.distill.general.epochs > 0
    for stage in (*(name for _, _, name in assistants(config)), rundir.DISTILL):
        before = f"{stage}-general"
        names += [*([rundir.targets_of(before, 0)] if kept else []), before] if general else []
        names += [rundir.targets_of(stage, number) for number in teachers] if kept else []
        names.append(stage)
        teachers = range(1)  # only the first student has several
    return names


def run_all(config: Config, say: Say) -> dict[str, Any]:
    """The whole chain as the configuration has it. Returns the report, with `wall_s`."""
    started = time.time()
    run = prepare(config, say)
    with cluster(config.cluster, needs(config), run.run_dir):
        report = _stages(run)
    if config.distill:
        export(run, report, ("hf",))  # there, whatever else is refused
        wanted = config.export or ExportConfig()
        if set(wanted.to) - {"hf"} or wanted.vocabulary == "corpus":
            exported = export(run, report, wanted.to, vocabulary=wanted.vocabulary)
            report |= {key: exported[key] for key in ("artefacts", "vocabulary") if key in exported}
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
    work = {"finetune": finetune, "distill": distill, "evaluate": evaluate}[stage]
    for teacher in run.teacher_dirs if stage in ("distill", "evaluate") and config.finetune else ():
        if not Path(teacher).exists():
            raise ConfigError(f"expected a fine-tuned teacher at {teacher}, found none: run finetune first")
    with cluster(config.cluster, needs(config), run.run_dir):
        return work(run) or {"stage": stage, **(rundir.read_summary(run.run_dir, stage) or {})}


def export_run(
    run_dir: Path, formats: tuple[Format, ...], force: bool, say: Say, vocabulary: Vocabulary | None = None,
    to: Repository | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The student of a run in other formats; `formats` empty, `vocabulary` None: as the run's configuration has it.

    `to`: where it is pushed to then; its address stands in the result as `pushed`.
    """
    config = run_config(run_dir)
    wanted = config.export or ExportConfig()
    words = vocabulary or wanted.vocabulary
    run = reopened(config, say) if words == "teacher" else prepare(config, say)  # other words: other rows of the corpus
    report = rundir.read_report(run.run_dir)
    exported = export(run, report, formats or wanted.to, force, words, to.name if to else None)
    if to is not None:
        say(f"push: to {to.name}")
        message = f"{config.name}: exported by raydistil, configuration {result_hash(config)}"
        exported["pushed"] = push(Path(exported["student_dir"]), to, message)
        say(f"push: there, at {exported['pushed']}")
    return exported


def _check_stage(config: Config, stage: str) -> None:
    """Raise ConfigError for a stage the configuration says nothing of."""
    needed = {"finetune": config.finetune, "distill": config.distill, "evaluate": config.evaluate}
    if needed.get(stage, True) is None:
        raise ConfigError(f"expected a section [{stage}] to run that stage, found none: add it to the file")
