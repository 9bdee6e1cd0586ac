"""A small configuration, and another value for every key there is."""

import json
from pathlib import Path
from typing import Any

from raydistil.config.loss import TERMS

BASE: dict[str, Any] = {
    "task": "classification",
    "corpus.source": "rows.jsonl",
    "teacher.model": "teacher",
    "student.layers": [0, 2],
    "finetune.epochs": 3,
    "distill.epochs": 3,
    "evaluate.batch_size": 32,
    "export.license": "MIT",
}
TRAIN: dict[str, Any] = {
    "epochs": 4, "lr": 1e-3, "warmup_share": 0.5, "betas": [0.5, 0.5], "eps": 1e-6, "weight_decay": 0.5, "clip": 2.0,
    "micro_batch_size": 5, "micro_batch_tokens": 999, "accumulation": 2, "precision": "bfloat16", "zero_stage": 2,
    "dropout": 0.2, "freeze_embeddings": True, "max_skipped_steps": 0,
    "deepspeed": {"zero_optimization": {"overlap_comm": True}},
}  # fmt: skip
DEFINING: dict[str, Any] = {
    "seed": 7, "task": "mlm",
    "corpus.source": "others.csv", "corpus.validation_source": "v.csv", "corpus.test_source": "t.csv",
    "corpus.validation_share": 0.25, "corpus.test_share": 0.5, "corpus.text_column": "body",
    "corpus.label_column": "kind", "corpus.context_column": "page", "corpus.pair_column": "other",
    "corpus.hub_config": "20231101.en",
    "corpus.libraries": ["json", "email"], "corpus.labelled_share": 0.5,
    "corpus.max_bad_rows": 1, "corpus.max_rows": 10, "corpus.max_rows_per_label": 11, "corpus.max_rows_per_module": 12,
    "tokens.length": 64, "tokens.buckets": [16, 32], "tokens.stride": 16, "tokens.min_tokens": 3,
    "tokens.max_unknown_share": 0.5,
    "masking.kind": "frequency", "masking.share": 0.3, "masking.smoothing": 0.5,
    "teacher.model": "another", "teacher.precision": "bfloat16", "teacher.weight": 2.0,
    "ensemble": [{"model": "third", "weight": 0.5}],
    "student.layers": [1], "student.model": "small", "student.family": "distilbert",
    "student.vocabulary": "corpus",
    "assistants": [{"num_layers": 4, "rule": "last", "epochs": 2, "lr": 0.5}],
    "student.start": "finetuned", "student.num_layers": 2, "student.rule": "last", "student.hidden_size": 16,
    "student.num_heads": 2, "student.ffn_size": 8, "student.narrow": "svd",
    **{f"finetune.{key}": value for key, value in TRAIN.items()}, 
    **{f"distill.{key}": value for key, value in TRAIN.items()},
    "distill.loss.triple": True,
    "distill.loss.kd": 1.0, "distill.loss.temperature": 4.0, "distill.loss.task": 0.75, "distill.loss.cosine": 0.25,
    "distill.loss.kd_positions": "all", "distill.loss.kd_sample": 0.5, "distill.loss.divergence": "reverse_kl",
    "distill.loss.beta": 0.3, "distill.loss.label_smoothing": 0.1, "distill.loss.hidden.weight": 2.0,
    "distill.loss.hidden.layers": [[0, 0], [4, 2]], "distill.loss.pkd.weight": 2.0,
    "distill.loss.pkd.layers": [[4, 2]], "distill.loss.attention.weight": 2.0,
    "distill.loss.attention.layers": [[4, 2]], "distill.loss.minilm.weight": 2.0, "distill.loss.minilm.version": 1,
    "distill.loss.minilm.teacher_layer": 5, "distill.loss.minilm.relation_heads": 12,
    "distill.loss.triplet.weight": 2.0, "distill.loss.triplet.margin": 0.3, "distill.loss.triplet.guided": True,
    "distill.loss.triplet.mining": "semi_hard", "distill.loss.triplet.largest_margin": 0.7,
    "distill.loss.triplet.pooling": "mean", "distill.loss.contrastive.weight": 2.0,
    "distill.loss.contrastive.temperature": 0.3, "distill.loss.contrastive.pooling": "mean",
    **{f"distill.loss.schedule.{term}.linear": [1.0, 0.5] for term in TERMS},
    **{f"distill.loss.schedule.{term}.steps": [[0.0, 1.0], [0.5, 2.0]] for term in TERMS},
    "distill.targets.codec": "topk", "distill.targets.top_k": 8, "distill.targets.num_draws": 7,
    "distill.general.epochs": 2, "distill.general.lr": 1e-3,
    "distill.targets.states": "int8", "distill.targets.mask_variants": 3, "distill.augment.keep": 0.5,
    "distill.augment.join": 0.1, "distill.augment.cut": 0.1, "distill.augment.mask": 0.2,
    "distill.augment.replace": 0.2, "distill.augment.drop": 0.2,
}  # fmt: skip
PLACING: dict[str, Any] = {
    "name": "other", "output_dir": "elsewhere", "distill.targets.cache": "kept",
    "checkpoints.every_min": 1.5, "checkpoints.every_steps": 7, "checkpoints.keep_last": 1, "checkpoints.keep_best": 1,
    "checkpoints.keep_at_end": True, "checkpoints.storage": "s3://bucket/folder",
    "evaluate.batch_size": 8, "evaluate.no_teacher_baseline": True, "evaluate.baseline_lr": 0.5,
    "evaluate.latency_length": 8, "evaluate.latency_rounds": 3, "export.license": "Apache-2.0",
    "export.license_link": "https://example.org/license",
    "export.to": ["hf", "onnx"], "export.vocabulary": "corpus",
    "cluster.address": "auto", "cluster.object_store_bytes": 1 << 30, "cluster.students": 2,
    "cluster.student_cpus": 2.0, "cluster.student_gpus": 1.0, "cluster.student_threads": 3,
    "cluster.teachers": [2, 4], "cluster.teacher_cpus": 0.5, "cluster.teacher_gpus": 0.5,
    "cluster.teacher_threads": 1, "cluster.max_bytes_in_flight": 1 << 21,
    "cluster.trace": True, "cluster.hang_timeout_s": 30.0,
    "cluster.max_failures": 1, "cluster.student_label_selector": {"pool": "a"},
    "cluster.teacher_label_selector": {"pool": "b"},
}  # fmt: skip
LEAVES = DEFINING | PLACING
NEEDED: dict[str, dict[str, Any]] = {  # keys that make no sense alone
    "student.rule": {"student.num_layers": 2}, "student.narrow": {"student.ffn_size": 8},
    "distill.targets.cache": {"distill.augment.keep": 1.0},
    **{key: {"task": "mlm"} for key in DEFINING if key.startswith("masking.")},
    "masking.smoothing": {"task": "mlm", "masking.kind": "frequency"},
    "distill.loss.triple": {"task": "mlm"}, "distill.loss.kd_positions": {"task": "mlm"},
    "distill.loss.kd_sample": {"task": "mlm", "distill.loss.kd_positions": "sample"},
    "distill.loss.beta": {"distill.loss.divergence": "jensen_shannon"},
    "distill.loss.triplet.largest_margin": {"distill.loss.triplet.guided": True},
    "distill.targets.top_k": {"distill.targets.codec": "topk"},
    "distill.targets.num_draws": {"distill.targets.codec": "sampled"},
    "tokens.stride": {"task": "question_answering"}, "corpus.context_column": {"task": "question_answering"},
    "teacher.weight": {"ensemble": [{"model": "third"}]},
}  # fmt: skip


def toml(value: Any) -> str:
    """`value` as TOML writes it on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def write(path: Path, flat: dict[str, Any]) -> Path:
    """A TOML file with one dotted key a line."""
    path.write_text("".join(f"{key} = {toml(value)}\n" for key, value in flat.items()), encoding="utf8")
    return path


def changed(key: str) -> dict[str, Any]:
    """BASE with another value for `key`."""
    flat = BASE | NEEDED.get(key, {}) | {key: LEAVES[key]}
    if key in ("student.model", "student.num_layers", "student.rule"):
        del flat["student.layers"]
    _, scheduled, rest = key.partition("distill.loss.schedule.")
    term = rest.partition(".")[0]
    if scheduled and term in ("task", "cosine"):
        flat[f"distill.loss.{term}"] = 1.0
    elif scheduled and term != "kd":
        flat[f"distill.loss.{term}.weight"] = 1.0  # a schedule of a term that is left out is refused
    return flat
