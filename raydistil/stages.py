"""One training of the chain: what flows, what the worker is made of, whether the teacher speaks or its kept word."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from raydistil import rundir
from raydistil.cache.inputs import inputs_of, said_by
from raydistil.cache.sizes import cache_spec, num_logits, sizes_of
from raydistil.chain import Link
from raydistil.cluster import address_of
from raydistil.config.loss import LossConfig
from raydistil.config.targets import variants_of
from raydistil.config.train import TrainConfig
from raydistil.layers import LayerPlan, plan_layers
from raydistil.manifest import Manifest
from raydistil.models import outline, resolve, shape_of
from raydistil.places import compared_share
from raydistil.plan import Threads, threads
from raydistil.prepare import Prepared
from raydistil.size import forward_flops
from raydistil.specs import CacheSpec, SaveSpec, SourceSpec, TeacherSpec, TrainRun, WorkerSpec
from raydistil.storage import mebibytes
from raydistil.tally import advice
from raydistil.targets import makes_logits, targets_spec
from raydistil.types import TrainSummary, models_language, takes_labels


def manifest_of(run: Prepared, config: TrainConfig, with_teacher: bool, seed: int) -> Manifest:
    """All rows where there is a teacher; without one, what has no label cannot be learned from."""
    labelled = takes_labels(run.config.task) and not with_teacher
    rows = run.store.bucket_rows("train", labelled)
    budget, lengths = config.micro_batch_tokens, run.store.lengths("train")
    sizes = tuple(budget // length for length in lengths) if budget else ()
    return Manifest(rows, config.epochs, config.micro_batch_size, seed, sizes)


def per_step(run: Prepared, stage: str, config: TrainConfig) -> int:
    """Micro-batches of an optimizer step: as the file says, or as they were when the stage was begun."""
    kept = rundir.checkpoints_of(run.config, stage).newest()
    return run.config.cluster.most_students * config.accumulation if kept is None else kept.state.per_step


@dataclass(frozen=True, slots=True)
class Training:
    """What is trained, from what, and on whose word."""

    stage: str
    config: TrainConfig
    loss: LossConfig
    init: str
    target: str  # directory of its result, below the run's
    seed: int
    link: Link | None = None  # whose teachers speak; None: no teacher
    micro_batches: int | None = None  # None: every epoch to its end
    variants: int | None = None  # without a teacher: see SourceSpec


def train_stage(run: Prepared, training: Training) -> None:
    """One training, unless its model is there already."""
    from raydistil.train import clear_up, train

    stage, target = training.stage, run.run_dir / training.target
    if target.exists():
        if run.config.checkpoints.storage is None:  # a place of its own: whoever made it was killed before
            clear_up(run.config.checkpoints, rundir.checkpoints_of(run.config, stage))
        run.say(f"{stage}: done before, kept in {target}")
        return
    planned = train_run(run, training)

    def record(summary: TrainSummary) -> None:
        figures = asdict(summary) | {"rows": planned.source.manifest.num_rows, "lr": training.config.lr}
        rundir.write_summary(run.run_dir, stage, figures)
        run.say(_describe(stage, summary, bool(planned.source.caches), planned.worker.shares_cores))

    train(planned, target, run.say, record)


def train_run(run: Prepared, training: Training) -> TrainRun:
    """What flows and who learns from it; the teachers' targets are made first where they are to be kept."""
    manifest = manifest_of(run, training.config, training.link is not None, training.seed)
    worker = _worker(run, training, manifest)
    source = _source(run, training, manifest, worker.teachers)
    store = rundir.checkpoints_of(run.config, training.stage)
    said = [said_by(each) for each in worker.teachers if Path(each.model).is_dir()]  # a hub's name stands for itself
    run_hash = rundir.run_hash(run.config, run.store.path.name, said)
    save = SaveSpec(store, run.config.checkpoints, run_hash, run.config.model_dump(mode="json"))
    return TrainRun(training.stage, source, worker, save, run.config.cluster, run.run_dir)


def _source(run: Prepared, training: Training, manifest: Manifest, teachers: tuple[TeacherSpec, ...]) -> SourceSpec:
    """The micro-batches, and the teachers' targets of all of them where they are to be kept."""
    masking, link = run.config.masking if run.config.task == "mlm" else None, training.link
    if link is None:
        return SourceSpec(run.store.path, "train", manifest, masking, variants=training.variants)
    targets = link.train.targets
    source = SourceSpec(run.store.path, "train", manifest, masking, link.train.augment, variants_of(targets))
    if targets.cache is None:
        return source
    kept = (_kept(run, link.stage, targets.cache, number, spec, source) for number, spec in enumerate(teachers))
    return replace(source, caches=tuple(kept))


def _kept(
    run: Prepared, stage: str, root: Path, number: int, teacher: TeacherSpec, source: SourceSpec
) -> CacheSpec:  # fmt: skip
    """The targets of all micro-batches of `source`, made here as far as they are not there."""
    from raydistil.fill import fill_cache

    shape = shape_of(teacher.model, "teacher.model")
    classes = num_logits(teacher.task, len(run.labels), shape, run.config.tokens.length)
    sizes = sizes_of(teacher.task, teacher.targets, run.config.masking.share, shape.hidden_size, classes)
    inputs = inputs_of(teacher, source)
    cache = cache_spec(root, inputs, teacher.targets, source, sizes)
    tokens = run.store.meta.splits[source.split].tokens
    filled = fill_cache(cache, inputs, source, teacher, sizes, tokens, run.config.cluster, run.say)
    figures = asdict(filled) | {"bytes_per_token": filled.bytes_per_token}
    rundir.write_summary(run.run_dir, rundir.targets_of(stage, number), figures)
    return cache


def _worker(run: Prepared, training: Training, manifest: Manifest) -> WorkerSpec:
    """What every student worker is given; the teachers with it."""
    config, loss, link = run.config, training.loss, training.link
    cached = link is not None and link.train.targets.cache is not None
    joined = address_of(config.cluster) is not None
    planned = threads(config.cluster, len(link.teachers) if link else 0, cached, joined)
    student = shape_of(training.init, "student.model")
    teacher = student if link is None else shape_of(link.teacher, "teacher.model")
    head = link is not None and makes_logits(link.train.targets, loss, config.task)
    layers = plan_layers(loss, config.task, head, teacher.num_hidden_layers, student.num_hidden_layers)
    together = per_step(run, training.stage, training.config)
    teachers = () if link is None else tuple(_teachers(run, link, layers, planned))
    return WorkerSpec(
        task=config.task, init=training.init, tokenizer=resolve(config.teacher.model),
        teachers=teachers,
        weights=() if link is None else link.weights, frozen_teacher=head or bool(layers.attention_layers[0]),
        teacher_width=teacher.hidden_size, layers=layers, labels=run.labels, train=training.config, loss=loss,
        seed=training.seed, threads=planned.student, per_epoch=manifest.per_epoch,
        mean_rows=manifest.mean_rows,
        num_steps=-(-(training.micro_batches or manifest.num_micro_batches) // together), per_step=together,
        flops_per_token=_flops_per_token(run, training, teachers, head and models_language(config.task)),
        hang_timeout_s=config.cluster.hang_timeout_s,
        traced=(run.run_dir.resolve(), training.stage) if config.cluster.trace else None,
    )  # fmt: skip


def _flops_per_token(run: Prepared, training: Training, teachers: tuple[TeacherSpec, ...], head: bool) -> float:
    """What a real token takes in matrix products where the student is: forward, and twice that backward.

    Of the teachers all where they work on the same cores; else the vocabulary `head` that is used beside the student.
    """
    config, counts = run.config, run.store.meta.splits["train"]
    length, compared = counts.tokens / counts.rows, 1.0
    if models_language(config.task):
        compared = compared_share(training.loss, config.masking.share if config.task == "mlm" else 1.0)
    flops = 3 * forward_flops(outline(training.init, config.task), length, compared)
    for number, teacher in enumerate(teachers):
        model = outline(teacher.model, config.task)
        whole, bare = (forward_flops(model, length, share) for share in (compared, 0.0))
        flops += whole if teacher.behind else (whole - bare) * (head and number == 0)
    return flops


def _teachers(run: Prepared, link: Link, layers: LayerPlan, planned: Threads) -> Iterator[TeacherSpec]:
    """The first one with hidden states, those beside it with soft labels alone; none that would have nothing to say."""
    config, loss = run.config, link.train.loss
    if not (layers.teacher_states or loss.kd):
        return
    wanted = targets_spec(link.train.targets, loss, config.task, layers, config.seed)
    for number, model in enumerate(link.teachers):
        asked = wanted if number == 0 else replace(wanted, states=(), soft_labels=True)
        yield TeacherSpec(
            model, config.task, config.teacher.precision, planned.teacher, asked, behind=planned.shared
        )  # fmt: skip


def _describe(stage: str, summary: TrainSummary, kept: bool, shared: bool) -> str:
    text = f"{stage}: {summary.steps} steps, {summary.tokens:,} tokens in {summary.wall_s:.0f} s"
    if summary.teacher_builds:
        both = summary.overlap_s / max(summary.student_busy_s, 1e-9)
        text += (
            f"; teacher built {summary.teacher_builds}x, at work during {both:.0%} of the student's time, "
            f"student waited {summary.wait_s / max(summary.wall_s, 1e-9):.0%}"
        )
    elif kept:
        text += f"; teacher built 0x, student waited {summary.wait_s / max(summary.wall_s, 1e-9):.0%}"
    if kept or summary.teacher_builds:
        text += f", {summary.wire_bytes / max(1, summary.tokens):,.0f} bytes/token"
    text += f"; saved {summary.checkpoints}x, {summary.saving_s / max(summary.wall_s, 1e-9):.1%} of the time"
    if summary.spilled_bytes:
        text += f"; {mebibytes(summary.spilled_bytes)} spilled from the object stores to disks: if nobody else filled "
        text += "them, lower cluster.max_bytes_in_flight"
    if summary.verdict:
        text += f"; {summary.verdict}: {advice(summary.verdict, shared)}"
    return text
