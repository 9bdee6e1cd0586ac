"""The model card: what the student is, made of the measured numbers."""

from typing import Any

from raydistil.chain import teacher_models
from raydistil.config import Config
from raydistil.config.student import StudentConfig
from raydistil.types import Task

PIPELINE_TAGS: dict[Task, str] = {
    "classification": "text-classification", "regression": "text-classification", "mlm": "fill-mask",
    "clm": "text-generation", "token_classification": "token-classification",
    "question_answering": "question-answering", "embedding": "sentence-similarity",
}  # fmt: skip


def model_card(config: Config, report: dict[str, Any]) -> str:
    """Front matter, what the model is, and a table of what was measured (nothing where nothing was)."""
    license_line = f"license: {config.export.license}\n" if config.export and config.export.license else ""
    tag = PIPELINE_TAGS[config.task]
    head = f"---\n{license_line}library_name: transformers\npipeline_tag: {tag}\n---\n\n# {config.name}\n\n"
    teachers = " and ".join(f"`{model}`" for model in teacher_models(config))
    body = (
        f"A student of {teachers}, started from {_start(config.student)} and distilled on "
        f"`{config.corpus.source}` with raydistil (seed {config.seed}).\n"
    )
    scores = _card_table(report) if "models" in report else "\nNot evaluated.\n"
    return head + body + scores + (_files(report["artefacts"]) if report.get("artefacts") else "")


def _files(artefacts: list[dict[str, Any]]) -> str:
    """What was measured of the exported files."""
    lines = [
        "",
        "| file | MiB | score | p50, p99 (ms) | texts a second | memory (MiB) | off by |",
        "|---|" + "---|" * 6,
    ]
    for made in artefacts:
        off = "" if made["difference"] is None else f"{made['difference']:.1e}"
        lines.append(
            f"| {made['file']} | {made['bytes'] / 2**20:.1f} | {made['score']['value']:.4f} | "
            f"{made['latency_p50_ms']:.1f}, {made['latency_p99_ms']:.1f} | {made['rows_s']:.1f} | "
            f"{made['peak_mib']:.0f} | {off} |"
        )
    first = artefacts[0]
    return "\n".join(lines) + (
        f"\n\nOn {first['score']['rows']:,} {first['split']} items; one thread, real texts of mixed length; off by: "
        f"the largest difference of a logit from the PyTorch model's.\n"
    )


def _start(config: StudentConfig) -> str:
    """Where the student's weights come from, in words."""
    if config.model is not None:
        return config.model
    sizes = {"hidden size": config.hidden_size, "heads": config.num_heads, "feed-forward size": config.ffn_size}
    width = ", ".join(f"{name} {size}" for name, size in sizes.items() if size)
    layers = f"layers {list(config.layers)}" if config.layers else f"{config.num_layers or 'all'} layers"
    rule = f" ({config.rule})" if config.num_layers else ""
    return f"{layers}{rule} of it" + (f", cut to {width} ({config.narrow})" if width else "")


def _card_table(report: dict[str, Any]) -> str:
    lines = ["", "| model | parameters | score | 95 % interval | latency p50 (ms) |", "|---|---|---|---|---|"]
    for model in report["models"]:
        score = model["score"]
        latency = "" if model["latency_p50_ms"] is None else f"{model['latency_p50_ms']:.1f}"
        lines.append(
            f"| {model['name']} | {model['parameters']:,} | {score['value']:.4f} | "
            f"{score['low']:.4f} to {score['high']:.4f} | {latency} |"
        )
    metric, rows = report["models"][0]["score"]["metric"], report["models"][0]["score"]["rows"]
    beside = _beside(report, "perplexity", "Perplexity", ".2f")
    beside += _beside(report, "pearson", "Pearson", ".4f") + _beside(report, "rmse", "RMSE", ".4g")
    return "\n".join(lines) + (
        f"\n\nScore: {metric} on {rows:,} test items.{beside} Retention {report['retention'] or 0:.3f}, speed-up "
        f"{report['speedup']:.2f}x (one row, one thread). Configuration {report['config_hash']}.\n"
    )


def _beside(report: dict[str, Any], figure: str, name: str, form: str) -> str:
    """A sentence of another figure of the same items, where it was measured."""
    known = [f"{model['name']} {model[figure]:{form}}" for model in report["models"] if model[figure] is not None]
    return f" {name} of the same: {', '.join(known)}." if known else ""
