"""check: the resolved configuration, a sample of the data and the plan. Trains nothing and starts no Ray process."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch

from raydistil.cache.sizes import Sizes, num_logits, sizes_of
from raydistil.cluster import address_of, check_before_start
from raydistil.config import Config, explain, load_config, read_toml
from raydistil.config.targets import variants_of
from raydistil.config.train import DistillConfig
from raydistil.errors import DataError
from raydistil.layers import plan_layers
from raydistil.models import load_tokenizer, quiet_transformers
from raydistil.optim import deepspeed_config
from raydistil.places import compared_share
from raydistil.plan import cores, local_cpus, threads
from raydistil.prepare import (
    check_models,
    check_packages,
    classes_of_teacher,
    corpus_of,
    describe_heads,
    needs,
    num_outputs,
    outlines,
)
from raydistil.probe import probe
from raydistil.size import describe_model
from raydistil.specs import TargetsSpec
from raydistil.steps import MICRO_BATCHES_PER_BLOCK
from raydistil.storage import free_bytes, mebibytes
from raydistil.tally import advice
from raydistil.targets import makes_logits, targets_spec
from raydistil.tokens import class_names, data_classes
from raydistil.tokens.writer import STRIDE
from raydistil.types import TextRow, has_classes, models_language

ROWS_READ = 1000  # enough to meet most defects; `run` reads all
SHOWN_CHARACTERS = 200
SHOWN_TOKENS = 40


def check(path: Path, overrides: list[str], show: int, probes: bool = False) -> dict[str, Any]:
    """What `run` would do. Raises what it would raise, as far as the first rows and the machine here tell.

    `probes`: also take some steps, to say who will hold the stream up.
    """
    quiet_transformers()
    config = load_config(path, overrides)
    check_packages(config)
    check_models(config)
    check_before_start(config.cluster, needs(config))
    rows, notes = _sample(config)
    heads = describe_heads(config, _num_outputs(config, rows)) if len(rows) < ROWS_READ else ()
    origins = explain(config, read_toml(path), overrides)
    return {
        "config": [{"key": key, "value": value, "origin": origin} for key, value, origin in origins],
        "examples": _examples(config, rows[:show]),
        "models": _models(config, rows),
        "data": [*notes, *heads, f"read {len(rows):,} rows without complaint (run reads all)"],
        "plan": [
            *_plan(config),
            *_in_flight(config, rows),
            *_kept(config, rows),
            *(_probed(config, rows) if probes else ()),
        ],
        "deepspeed": None if config.distill is None else deepspeed_config(config.distill, config.distill.accumulation),
    }


def _sample(config: Config) -> tuple[list[TextRow], tuple[str, ...]]:
    corpus = corpus_of(config)
    rows = list(islice(corpus.rows(), ROWS_READ))
    if not any(row.text.strip() for row in rows):
        raise DataError(f"corpus.source: expected texts in {config.corpus.source}, found none: the corpus is empty")
    if has_classes(config.task) and len(rows) < ROWS_READ:
        class_names(rows, classes_of_teacher(config))
    return rows, corpus.notes


def _num_outputs(config: Config, rows: list[TextRow]) -> int:
    """Of a class head, by the rows that were read; of another one."""
    return num_outputs(config.task, classes_of_teacher(config) or data_classes(rows))


def _models(config: Config, rows: list[TextRow]) -> dict[str, dict[str, Any]]:
    """The sizes of teacher and student, with a class head for the classes of the rows that were read."""
    classes = _num_outputs(config, rows) if has_classes(config.task) and config.finetune else None
    outlined = outlines(config, classes)
    sizes = [describe_model(model, config.tokens.length) for model in outlined]
    between = [f"assistant-{number}" for number in range(1, len(sizes) - 1)]
    return {
        name: asdict(size) | {"text": size.line()}
        for name, size in zip(("teacher", *between, "student"), sizes, strict=True)
    }


def _examples(config: Config, rows: list[TextRow]) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(config.teacher.model)
    return [
        {
            "source": row.source,
            "label": _label(row),
            "text": " ".join(f"{row.text} {row.context or ''}".split())[:SHOWN_CHARACTERS],
            "tokens": tokenizer.tokenize(row.text)[:SHOWN_TOKENS],
        }
        for row in rows
    ]


def _label(row: TextRow) -> str | None:
    """What is known of it, as one line."""
    if row.tags is not None:
        return " ".join(row.tags)[:SHOWN_CHARACTERS]
    if row.answers is not None:
        return " | ".join(answer.text for answer in row.answers) or "no answer"
    return row.label


def _plan(config: Config) -> list[str]:
    """How the run would be laid out here."""
    pools = 1 + len(config.ensemble) if config.distill else 0
    planned = threads(config.cluster, pools, _caches(config), address_of(config.cluster) is not None)
    where = address_of(config.cluster) or f"a local cluster of {local_cpus()} logical CPUs on {cores()} cores"
    lines = [f"on {where}, {torch.cuda.device_count()} GPUs"]
    lines += [need.arithmetic() for need in needs(config)]
    if config.student.vocabulary == "corpus":
        lines.append(
            "vocabulary: cut down to that of the training texts when the run starts; sizes here are of the whole"
        )
    behind = ", which takes what students leave of the same cores" if planned.shared else ""
    return [*lines, f"threads: {planned.student} for a student, {planned.teacher} for a teacher{behind}"]


def _probed(config: Config, rows: list[TextRow]) -> Iterator[str]:
    """What a few steps here promise of the first distillation, without a general one; nothing without a teacher."""
    found = probe(config, ROWS_READ)
    if found is None:
        return
    teachers, students = config.cluster.teachers[1], config.cluster.most_students
    verdict, first = found.verdict(teachers, students), config.trainings()[0]
    seconds = first.epochs * _amount(config, rows)[0] / found.tok_s(teachers, students)
    yield (
        f"{found.steps} steps here: a teacher {found.teacher_tok_s / 1000:.1f}k tok/s, a student "
        f"{found.student_tok_s / 1000:.1f}k tok/s, {found.bytes_per_token:,.0f} bytes/token; {teachers} of the one and "
        f"{students} of the other, as fast as these, would take {seconds / 60:,.1f} min for {first.epochs} epochs; "
        f"{verdict}: {advice(verdict, found.shared)}"
    )


def _caches(config: Config) -> bool:
    return config.distill is not None and config.distill.targets.cache is not None


# ---- what keeping the targets would take


def _kept(config: Config, rows: list[TextRow]) -> Iterator[str]:
    """How large each teacher's cache would be, by the rows read here; nothing without a cache."""
    if config.distill is None or config.distill.targets.cache is None:
        return
    root = config.distill.targets.cache
    tokens, num_rows = _amount(config, rows)
    for variants, wanted, teacher, _ in _asked(config):
        sizes = _sizes(config, rows, wanted, teacher)
        yield (
            f"targets: about {mebibytes(variants * sizes.of(tokens, num_rows))} in {root} before compression "
            f"({variants} x ({tokens:,.0f} tokens x {sizes.per_token:.4g} bytes + {num_rows:,.0f} rows x "
            f"{sizes.per_row:.4g})), {mebibytes(free_bytes(root.expanduser()))} free there"
        )


def _in_flight(config: Config, rows: list[TextRow]) -> Iterator[str]:
    """That not all teachers will be at work, where the bound of what is on its way is too small for a block of each."""
    if config.distill is None or _caches(config):
        return
    bound, most = config.cluster.max_bytes_in_flight, config.cluster.teachers[1]
    block = max(_block_bytes(config, rows, wanted, teacher, part) for _, wanted, teacher, part in _asked(config))
    if most * block > bound:
        yield (
            f"in flight: a teacher's blocks of about {mebibytes(block)} leave {max(1, bound // block)} of {most} at "
            f"work within cluster.max_bytes_in_flight {bound}: raise it to {most * block}"
        )


def _block_bytes(config: Config, rows: list[TextRow], wanted: TargetsSpec, teacher: Any, train: DistillConfig) -> int:
    """What a teacher makes in one call, at most: of micro-batches without padding."""
    tokens: float = train.micro_batch_tokens or train.micro_batch_size * config.tokens.length
    if wanted.compared:
        tokens *= compared_share(wanted.loss, config.masking.share if config.task == "mlm" else 1.0)
    sizes = _sizes(config, rows, wanted, teacher)
    return MICRO_BATCHES_PER_BLOCK * sizes.of(tokens, train.micro_batch_size)


def _sizes(config: Config, rows: list[TextRow], wanted: TargetsSpec, teacher: Any) -> Sizes:
    classes = _num_classes(config, rows, teacher)
    return sizes_of(config.task, wanted, config.masking.share, teacher.hidden_size, classes)


def _num_classes(config: Config, rows: list[TextRow], teacher: Any) -> int:
    """How many logits a soft label has."""
    return num_logits(config.task, _num_outputs(config, rows), teacher, config.tokens.length)


def _asked(config: Config) -> Iterator[tuple[int, TargetsSpec, Any, DistillConfig]]:
    """(variants of each row, what is wanted of it, the teacher's shape, for which training) for every teacher in the
    order of the work."""
    beside, pairs = len(config.ensemble), pairwise(made.config for made in outlines(config))
    for train, (teacher, student) in zip(config.trainings(), pairs, strict=True):
        for part in (train.general_training(), train) if train.general.epochs else (train,):
            variants, wanted = min(variants_of(part.targets) or 1, part.epochs), _wanted(config, part, teacher, student)
            yield variants, wanted, teacher, part
        for _ in range(beside):
            yield variants, replace(wanted, states=(), soft_labels=True), teacher, train
        beside = 0  # only the first student has several


def _wanted(config: Config, train: DistillConfig, teacher: Any, student: Any) -> TargetsSpec:
    head = makes_logits(train.targets, train.loss, config.task)
    layers = plan_layers(train.loss, config.task, head, teacher.num_hidden_layers, student.num_hidden_layers)
    return targets_spec(train.targets, train.loss, config.task, layers, config.seed)


def _amount(config: Config, rows: list[TextRow]) -> tuple[float, float]:
    """(tokens, rows) of the training split's store: by all of its texts, each as long as those of the sample."""
    most, sample = config.tokens.length, [row for row in rows if row.split == "train"]
    texts = len(sample)
    if len(rows) == ROWS_READ:
        texts = sum(row.split == "train" for row in corpus_of(config).rows())
    said = [f"{row.text} {row.context or ''}".strip() for row in sample]
    lengths = [len(ids) for ids in load_tokenizer(config.teacher.model)(said, verbose=False)["input_ids"]]
    kept = [length if models_language(config.task) else min(length, most) for length in lengths]
    mean = sum(kept) / max(1, len(kept))
    if models_language(config.task):
        return texts * mean, texts * mean / most
    new = most - (config.tokens.stride or most // STRIDE)  # what each window of a long context adds
    windows = sum(1 + max(0, -(-(length - most) // new)) for length in lengths) / max(1, len(lengths))
    rows_each = windows if config.task == "question_answering" else 1.0
    return texts * mean * rows_each, texts * rows_each
