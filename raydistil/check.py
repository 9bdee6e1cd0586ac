"""check: the resolved configuration, a sample of the data and the plan. Trains nothing and starts no Ray process."""

from itertools import islice
from pathlib import Path
from typing import Any

import torch

from raydistil.cache.sizes import Sizes, sizes_of
from raydistil.cluster import address_of, check_before_start
from raydistil.config import Config, DistillConfig, explain, load_config, read_toml
from raydistil.corpus import open_corpus
from raydistil.errors import DataError
from raydistil.fill import mebibytes
from raydistil.layers import plan_layers
from raydistil.models import load_tokenizer, quiet_transformers, shape_of
from raydistil.optim import deepspeed_config
from raydistil.plan import cores, local_cpus, threads
from raydistil.prepare import check_models, needs
from raydistil.storage import free_bytes
from raydistil.targets import makes_logits, targets_spec
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
    plan = _plan(config) + ([_kept(config, config.distill, rows)] if config.distill else [])
    origins = explain(config, read_toml(path), overrides)
    return {
        "config": [{"key": key, "value": value, "origin": origin} for key, value, origin in origins],
        "examples": _examples(config, rows[:show]),
        "data": [*notes, f"read {len(rows):,} rows without complaint (run reads all)"],
        "plan": [line for line in plan if line],
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
    student_threads, teacher_threads = threads(config.cluster, config.distill is not None, _caches(config))
    where = address_of(config.cluster) or f"a local cluster of {local_cpus()} logical CPUs on {cores()} cores"
    lines = [f"on {where}, {torch.cuda.device_count()} GPUs"]
    lines += [need.arithmetic() for need in needs(config)]
    return [*lines, f"threads: {student_threads} for a student, {teacher_threads} for a teacher"]


def _caches(config: Config) -> bool:
    return config.distill is not None and config.distill.targets.cache is not None


# ---- what keeping the targets would take


def _kept(config: Config, distill: DistillConfig, rows: list[TextRow]) -> str:
    """How large the cache would be, by the rows read here; empty without a cache."""
    root = distill.targets.cache
    if root is None:
        return ""
    tokens, num_rows = _amount(config, rows)
    variants = min(config.variants or 1, distill.epochs)
    sizes = _sizes(config, distill, rows)
    return (
        f"targets: about {mebibytes(variants * sizes.of(tokens, num_rows))} in {root} before compression ({variants} x "
        f"({tokens:,.0f} tokens x {sizes.per_token:.4g} bytes + {num_rows:,.0f} rows x {sizes.per_row:.4g})), "
        f"{mebibytes(free_bytes(root.expanduser()))} free there"
    )


def _amount(config: Config, rows: list[TextRow]) -> tuple[float, float]:
    """(tokens, rows) of the training split's store: by all of its texts, each as long as those of the sample."""
    labelled = config.task == "classification"
    sample = [row.text for row in rows if row.split == "train"]
    texts = len(sample)
    if len(rows) == ROWS_READ:
        texts = sum(row.split == "train" for row in open_corpus(config.corpus, labelled).rows())
    lengths = [len(ids) for ids in load_tokenizer(config.teacher.model)(sample, verbose=False)["input_ids"]]
    mean = sum(min(length, config.tokens.length) if labelled else length for length in lengths) / max(1, len(lengths))
    return texts * mean, texts if labelled else texts * mean / config.tokens.length


def _sizes(config: Config, distill: DistillConfig, rows: list[TextRow]) -> Sizes:
    teacher = shape_of(config.teacher.model, "teacher.model")
    of_student = config.student.model and shape_of(config.student.model, "student.model").num_hidden_layers
    head = makes_logits(distill.targets, distill.loss, config.task)
    depths = teacher.num_hidden_layers, of_student or len(config.student.layers)
    layers = plan_layers(distill.loss, config.task, head, *depths)
    wanted = targets_spec(distill.targets, distill.loss, config.task, layers, config.seed)
    if config.task == "classification":
        return sizes_of(wanted, None, teacher.hidden_size, len({row.label for row in rows} - {None}))
    return sizes_of(wanted, config.masking, teacher.hidden_size, teacher.vocab_size)
