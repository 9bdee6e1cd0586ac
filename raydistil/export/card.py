"""The model card: what the student is, how it was made and what was measured, for the hub and for people.

It is made of the run's configuration, its token store and the summaries and the report of its stages; what was not
measured does not stand there. Cards are published: of a path, only the last part is named.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from raydistil import rundir
from raydistil.chain import Link, links, teacher_models
from raydistil.config import Config, result_hash
from raydistil.config.loss import LossConfig
from raydistil.config.student import StudentConfig
from raydistil.config.train import TrainConfig
from raydistil.corpus.files import is_file_pattern
from raydistil.export.usage import usage
from raydistil.export.vocabulary import cut_line
from raydistil.heads import Pooling
from raydistil.models import shape_of
from raydistil.prepare import Prepared
from raydistil.student.layers import chosen_layers
from raydistil.tokens import StoreMeta
from raydistil.types import Task, takes_labels

PIPELINE_TAGS: dict[Task, str] = {
    "classification": "text-classification", "regression": "text-classification", "mlm": "fill-mask",
    "clm": "text-generation", "token_classification": "token-classification",
    "question_answering": "question-answering", "embedding": "sentence-similarity",
}  # fmt: skip
# What the report's figures are called at the hub.
METRICS = {
    "accuracy": "accuracy", "masked accuracy": "accuracy", "next-token accuracy": "accuracy", "Spearman": "spearmanr",
    "macro_f1": "f1", "mlm_loss": "loss", "clm_loss": "loss", "perplexity": "perplexity", "pearson": "pearsonr",
    "rmse": "rmse", "entity F1": "f1", "F1": "f1", "exact_match": "exact_match", "retrieval accuracy": "accuracy",
}  # fmt: skip
# Figures beside the score: what they are called, and how they are written.
FIGURES = {
    "macro_f1": ("Macro F1", ".4f"), "mlm_loss": ("Cross-entropy at the masks (nats)", ".4f"),
    "clm_loss": ("Cross-entropy (nats)", ".4f"), "perplexity": ("Perplexity", ".2f"), "pearson": ("Pearson", ".4f"),
    "rmse": ("RMSE", ".4g"), "accuracy": ("Accuracy", ".4f"), "exact_match": ("Exact match", ".4f"),
}  # fmt: skip
MOST_CLASSES = 20  # that are named


@dataclass(frozen=True, slots=True)
class Trained:
    """A training of the run."""

    stage: str
    config: TrainConfig
    loss: str  # its terms, in words
    summary: dict[str, Any]  # see TrainSummary, and the rows it went over


@dataclass(frozen=True, slots=True)
class Facts:
    """What a card is made of."""

    config: Config  # as it was written
    data: StoreMeta
    layers: tuple[int, ...]  # that the student started from; empty: from a checkpoint of its own
    trained: tuple[Trained, ...]
    report: dict[str, Any]
    pooling: Pooling = "mean"  # of vectors


def facts_of(config: Config, run: Prepared, report: dict[str, Any]) -> Facts:
    """`config` as it was written: the run's own may name the pruned teacher."""
    trained = (
        Trained(stage, train, loss, summary)
        for stage, train, loss in _trainings(config, run)
        if (summary := rundir.read_summary(run.run_dir, stage)) is not None
    )
    facts = Facts(config, run.store.meta, _layers(config, run), tuple(trained), report)
    if config.task != "embedding":
        return facts
    return replace(facts, pooling=shape_of(str(run.run_dir / rundir.DISTILLED), "student.model").pooling)


def _links(config: Config, run: Prepared) -> list[Link]:
    return list(links(config, run.teacher_dirs, run.run_dir)) if config.distill else []


def _layers(config: Config, run: Prepared) -> tuple[int, ...]:
    chain = _links(config, run)
    if config.student.model is not None or not chain:
        return ()
    return chosen_layers(config.student, shape_of(chain[-1].teacher, "teacher.model").num_hidden_layers)


def _trainings(config: Config, run: Prepared) -> Iterator[tuple[str, TrainConfig, str]]:
    """(stage, its section, its loss) in the order of the work."""
    for number in range(len(teacher_models(config))) if config.finetune else ():
        assert config.finetune is not None
        yield rundir.numbered("finetune", number), config.finetune, "the labels"
    for link in _links(config, run):
        for part in (link.general, link):
            if part is not None:
                yield part.stage, part.train, loss_line(part.train.loss)


# ---- the card


def model_card(facts: Facts, name: str | None = None) -> str:
    """`name`: of the repository at the hub that it is for; None: it is for nowhere but here."""
    parts = [_what(facts), _use(facts, name), _scores(facts.report), _recipe(facts), _data(facts)]
    parts += [_files(facts.report["artefacts"])] if facts.report.get("artefacts") else []
    return f"---\n{front_matter(facts, name)}\n---\n\n" + "\n".join(parts)


def front_matter(facts: Facts, name: str | None) -> str:
    config, results = facts.config, list(_results(facts))
    license_, link = (config.export.license, config.export.license_link) if config.export else (None, None)
    metrics = list(dict.fromkeys(result.metric_type for result in results))
    data = ModelCardData(
        license="other" if link else license_ and license_.lower(), license_name=license_ if link else None,
        license_link=link, library_name="transformers", pipeline_tag=PIPELINE_TAGS[config.task],
        base_model=hub_name(config.student.model or config.teacher.model), datasets=_data_set(config),
        metrics=metrics or None, model_name=name or config.name, eval_results=results or None,
    )  # fmt: skip
    return data.to_yaml()


def hub_name(model: str) -> str | None:
    """The name of a model at the hub, where `model` is one."""
    elsewhere = model.startswith(("package:", ".", "/", "~")) or Path(model).is_dir()
    return None if elsewhere else model


def _data_set(config: Config) -> str | None:
    source = config.corpus.source
    return None if source == "python-docs" or is_file_pattern(source) else source


def public(name: str) -> str:
    """`name` as it may stand in public: of a path, the last part."""
    return name if name.startswith("package:") or hub_name(name) is not None else Path(name).name


def published(report: dict[str, Any]) -> dict[str, Any]:
    """`report` without directories of this machine."""
    stages = report.get("stages", {}).items()
    kept = {name: done and {key: value for key, value in done.items() if key != "path"} for name, done in stages}
    return {key: value for key, value in report.items() if key != "student_dir"} | ({"stages": kept} if kept else {})


def _source(config: Config) -> str:
    source = config.corpus.source
    return source if source == "python-docs" or _data_set(config) else Path(source).name


def _results(facts: Facts) -> Iterator[EvalResult]:
    """What the student reached on the test split."""
    config = facts.config
    models = {model["name"]: model for model in facts.report.get("models", ())}
    student = models.get("exported", models.get("student"))
    if student is None:
        return
    metric = student["score"]["metric"]
    named = [(metric, metric.capitalize(), student["score"]["value"])]
    named += [(key, name, student[key]) for key, (name, _) in FIGURES.items() if student.get(key) is not None]
    for figure, name, value in named:
        yield EvalResult(
            task_type=PIPELINE_TAGS[config.task], dataset_type=_source(config), dataset_name=_source(config),
            dataset_config=config.corpus.hub_config, dataset_split="test", metric_type=METRICS[figure],
            metric_name=name, metric_value=round(value, 6),
        )  # fmt: skip


# ---- what it is


def _what(facts: Facts) -> str:
    config = facts.config
    teachers = [f"`{public(model)}`" for model in teacher_models(config)]
    before = "the assistant before it" if config.assistants else "it" if len(teachers) == 1 else teachers[0]
    return (
        f"# {config.name}\n\nA student of {' and '.join(teachers)}, started from "
        f"{_start(config.student, facts.layers, before)} and distilled on `{_source(config)}` with raydistil. "
        f"{_says(config.task, facts.data.labels, facts.data.pairs)}\n"
    )


def _says(task: Task, labels: tuple[str, ...], pairs: bool) -> str:
    if labels:
        more = f" and {len(labels) - MOST_CLASSES} more" if len(labels) > MOST_CLASSES else ""
        of = "words" if task == "token_classification" else "pairs of texts" if pairs else "texts"
        return f"It tells {len(labels)} classes of {of} apart: {', '.join(labels[:MOST_CLASSES])}{more}."
    return {
        "regression": f"It gives a {'pair of texts' if pairs else 'text'} a number.",
        "mlm": "It fills in masked tokens.",
        "clm": "It goes on with a text.",
        "question_answering": "It finds the answer to a question in a text.",
        "embedding": "It gives a text a vector; texts that mean the same have vectors that point the same way.",
    }[task]  # fmt: skip


def _start(config: StudentConfig, layers: tuple[int, ...], of: str) -> str:
    """Where the student's weights come from, in words; `of`: the model before it."""
    if config.model is not None:
        return f"`{public(config.model)}`"
    sizes = {"hidden size": config.hidden_size, "heads": config.num_heads, "feed-forward size": config.ffn_size}
    width = ", ".join(f"{name} {size}" for name, size in sizes.items() if size)
    cut = f", cut to {width} ({config.narrow})" if width else ""
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))} (counted from 0) of {of}{cut}"


def _use(facts: Facts, name: str | None) -> str:
    """Lines that load it with transformers alone."""
    lines = usage(facts.config.task, name or "path/to/this/directory", facts.pooling, facts.data.pairs)
    return f"```python\n{lines}```\n"


# ---- what was measured


def _scores(report: dict[str, Any]) -> str:
    if "models" not in report:
        return "## Scores\n\nNot evaluated.\n"
    lines = [
        "## Scores\n",
        "| model | parameters | MiB | MFLOPs a token | score | 95 % interval | latency p50 (ms) |",
        "|---" * 7 + "|",
    ]
    for model in report["models"]:
        score, latency = model["score"], model["latency_p50_ms"]
        lines.append(
            f"| {model['name']} | {model['parameters']:,} | {model['size_bytes'] / 2**20:.1f} | "
            f"{model['flops_per_token'] / 1e6:,.3g} | {score['value']:.4f} | {score['low']:.4f} to "
            f"{score['high']:.4f} | {'' if latency is None else f'{latency:.1f}'} |"
        )
    return "\n".join(lines) + f"\n\n{_score_lines(report)}\n"


def _score_lines(report: dict[str, Any]) -> str:
    score, kept = report["models"][0]["score"], report["retention"]
    found = [f"Score: {score['metric']} on {score['rows']:,} test items."]
    found += [line for figure in FIGURES if (line := _beside(report, figure))]
    found += [f"The student keeps {kept:.1%} of the teacher's score."] if kept is not None else []
    found.append(f"It is {report['speedup']:.2f}x as fast (one text, one thread).")
    found += ["Exported: the student with its vocabulary cut."] if "vocabulary" in report else []
    return " ".join(found)


def _beside(report: dict[str, Any], figure: str) -> str:
    """A sentence of another figure of the same items, where it was measured."""
    name, form = FIGURES[figure]
    known = [f"{model['name']} {model[figure]:{form}}" for model in report["models"] if model.get(figure) is not None]
    return f"{name} of the same: {', '.join(known)}." if known else ""


def _files(artefacts: list[dict[str, Any]]) -> str:
    """What was measured of the exported files."""
    lines = [
        "## Files\n",
        "| file | MiB | score | p50, p99 (ms) | texts a second | memory (MiB) | off by |",
        "|---" * 7 + "|",
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


# ---- how it was made


def _recipe(facts: Facts) -> str:
    config = facts.config
    lines = ["## Training\n"]
    if facts.trained:
        lines += [
            "| training | loss | epochs | learning rate | texts a step | steps | tokens | minutes | saving (s) |",
            "|---" * 9 + "|",
            *map(_training_row, facts.trained),
            "",
            "Texts a step: the mean (of language models, blocks). Tokens, minutes and the time that checkpoints took: "
            "since the training was last started.",
        ]
    lines += _beside_the_table(config)
    if "vocabulary" in facts.report:
        said = cut_line(facts.report["vocabulary"])
        lines.append(f"After the training the vocabulary was cut to what the training texts use: {said}.")
    return "\n".join([*lines, f"Seed {config.seed}. Configuration `{result_hash(config)}`."]) + "\n"


def _training_row(trained: Trained) -> str:
    config, done = trained.config, trained.summary
    return (
        f"| {trained.stage} | {trained.loss} | {config.epochs} | {config.lr:g} | "
        f"{config.epochs * done['rows'] / max(1, done['steps']):.1f} | {done['steps']:,} | {done['tokens']:,} | "
        f"{done['wall_s'] / 60:.1f} | {done['saving_s']:.1f} |"
    )


def _beside_the_table(config: Config) -> Iterator[str]:
    """What of the recipe has no column."""
    yield f"Matrix products of the teacher in {config.teacher.precision}."
    distill = config.distill
    if distill is not None and distill.augment is not None:
        yield "The student was shown variants of the training texts, made anew in every epoch."
    if distill is not None and distill.targets.cache is not None:
        yield "The teacher's targets were made before and kept; that time is not in the table."
    if config.finetune is None:
        yield "The teacher was used as it came."


def loss_line(loss: LossConfig) -> str:
    """`5 kd (forward_kl, temperature 2) + 2 task + 1 cosine`."""
    named = {name: weight for name, weight in loss.weights().items() if weight}
    return " + ".join(
        f"{weight:g} {name}{_kd(loss) if name == 'kd' else ''}{' (scheduled)' if loss.schedule.of(name) else ''}"
        for name, weight in named.items()
    )


def _kd(loss: LossConfig) -> str:
    return f" ({loss.divergence}{'' if loss.divergence == 'mse' else f', temperature {loss.temperature:g}'})"


def _data(facts: Facts) -> str:
    """Texts, rows and tokens of every split, and what is not in them."""
    config, labelled = facts.config, takes_labels(facts.config.task)
    lines = [
        "## Data\n",
        "| split | texts | rows | of them labelled | tokens | cut | left out |",
        "|---" * 7 + "|",
    ]
    for split, counts in facts.data.splits.items():
        lines.append(
            f"| {split} | {counts.texts:,} | {counts.rows:,} | {f'{counts.labelled_rows:,}' if labelled else ''} | "
            f"{counts.tokens:,} | {counts.truncated:,} | {counts.too_short + counts.too_unknown:,} |"
        )
    # Those for readers: no path of this machine, nothing on what to set.
    notes = [f"- {note}" for note in facts.data.notes if "/" not in note and "corpus." not in note]
    about = (
        f"Of `{_source(config)}`, {config.tokens.length} tokens a row at most. Left out: texts that are too short or"
    )
    return "\n".join([*lines, "", f"{about} have too many unknown tokens.", *([""] if notes else []), *notes]) + "\n"
