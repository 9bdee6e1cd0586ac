"""check: the resolved configuration, a sample of the data and the plan. Trains nothing and starts no Ray process."""

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from raydistil.cluster import address_of, check_before_start
from raydistil.config import Config, explain, load_config, read_toml
from raydistil.corpus import open_corpus
from raydistil.errors import DataError
from raydistil.models import load_tokenizer, quiet_transformers
from raydistil.optim import deepspeed_config
from raydistil.plan import cores, local_cpus, threads
from raydistil.prepare import check_models, needs, outlines
from raydistil.size import describe_model
from raydistil.tokens import class_names
from raydistil.types import TextRow

ROWS_READ = 1000  # enough to meet most defects; `run` reads all
SHOWN_CHARACTERS = 200
SHOWN_TOKENS = 40


def check(path: Path, overrides: list[str], show: int) -> dict[str, Any]:
    """What `run` would do. Raises what it would raise, as far as the first rows and the machine here tell."""
    quiet_transformers()
    config = load_config(path, overrides)
    check_models(config)
    check_before_start(config.cluster, needs(config))
    rows, notes = _sample(config)
    origins = explain(config, read_toml(path), overrides)
    return {
        "config": [{"key": key, "value": value, "origin": origin} for key, value, origin in origins],
        "examples": _examples(config, rows[:show]),
        "models": _models(config, rows),
        "data": [*notes, f"read {len(rows):,} rows without complaint (run reads all)"],
        "plan": _plan(config),
        "deepspeed": None if config.distill is None else deepspeed_config(config.distill),
    }


def _sample(config: Config) -> tuple[list[TextRow], tuple[str, ...]]:
    labelled = config.task == "classification"
    corpus = open_corpus(config.corpus, labelled)
    rows = list(islice(corpus.rows(), ROWS_READ))
    if not any(row.text.strip() for row in rows):
        raise DataError(f"corpus.source: expected texts in {config.corpus.source}, found none: the corpus is empty")
    if labelled and len(rows) < ROWS_READ:
        class_names(rows)
    return rows, corpus.notes


def _models(config: Config, rows: list[TextRow]) -> dict[str, dict[str, Any]]:
    """The sizes of teacher and student, with a class head for the classes of the rows that were read."""
    classes = {row.label for row in rows if row.label is not None}
    outlined = outlines(config, len(classes) if config.task == "classification" and config.finetune else None)
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
            "label": row.label,
            "text": " ".join(row.text.split())[:SHOWN_CHARACTERS],
            "tokens": tokenizer.tokenize(row.text)[:SHOWN_TOKENS],
        }
        for row in rows
    ]


def _plan(config: Config) -> list[str]:
    """How the run would be laid out here."""
    student_threads, teacher_threads = threads(config.cluster, with_teacher=config.distill is not None)
    where = address_of(config.cluster) or f"a local cluster of {local_cpus()} logical CPUs on {cores()} cores"
    lines = [f"on {where}, {torch.cuda.device_count()} GPUs"]
    lines += [need.arithmetic() for need in needs(config)]
    return [*lines, f"threads: {student_threads} for a student, {teacher_threads} for a teacher"]
