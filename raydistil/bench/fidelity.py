"""bench fidelity: what each loss is worth in task distillation, and what the default recipe keeps of the teacher.

Real parts only: every row is a run of the pipeline (Ray Data teacher, DeepSpeed student) on the user's labelled texts,
for several seeds, each with its own fine-tuned teacher, which all rows of that seed share. Students of one depth
that learn by the default recipe start from one general distillation, whatever the seed: the spread is that of the
fine-tuning, the order and the variants of the texts. The other rows have no general distillation and see the texts as
they are, for half as many epochs, so that they differ in their losses alone; their targets are made once and kept, but
for drawn ones. Where there are two classes, the likelier one and the tail say as much as both logits: that row shows
what the codec itself costs, which should be nothing. Scores are of the validation split, by which recipes are chosen,
and of the test split, which is looked at once.

Resumable: what is done is kept in the output directory, row by row.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raydistil import rundir
from raydistil.bench import MINILM
from raydistil.chain import links
from raydistil.cluster import cluster
from raydistil.config import Config, EvaluateConfig, config_of, digest
from raydistil.errors import DataError
from raydistil.pipeline import distill, finetune, lesson, score, teacher_of
from raydistil.plan import cores
from raydistil.prepare import Prepared, Say, needs, prepare
from raydistil.specs import Candidate, EvaluateSpec
from raydistil.stages import train_stage
from raydistil.types import Split

DEFAULT = "default"
SPLITS: tuple[Split, ...] = ("validation", "test")
Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: how it differs from the recipe."""

    name: str
    num_layers: int
    student: Tree = field(hash=False)
    distill: Tree = field(hash=False)
    targets: Tree = field(hash=False)
    kept: bool  # whether the targets are, where nothing in them is drawn anew in every epoch


def _ablation(name: str, loss: Tree, targets: Tree | None = None, kept: bool = True) -> Row:
    """Soft labels and hard ones alone but for what is named: no general distillation before (which a student of every
    other layer needs less), no variants of texts, half of the recipe's epochs. Such rows differ from each other in what
    is named, and are compared with each other."""
    plain = {"kd": 5.0, "temperature": 1.0, "task": 0.5, "cosine": 0.0, "hidden": {"weight": 0.0}}
    distill = {"epochs": 3, "loss": plain | loss, "augment": {"keep": 1.0}, "general": {"epochs": 0}}
    return Row(name, 3, {"rule": "every_other"}, distill, targets or {}, kept)


DEFAULTS = (Row(DEFAULT, 3, {}, {}, {}, kept=False), Row(DEFAULT, 2, {}, {}, {}, kept=False))
ROWS = (
    *DEFAULTS,
    _ablation("no KD", {"kd": 0.0, "task": 1.0}),
    _ablation("KD", {}),
    _ablation("KD + hidden MSE", {"hidden": {"weight": 1.0}}),
    _ablation("KD + cosine", {"cosine": 1.0}),
    _ablation("KD + MiniLMv2", {"minilm": {"weight": 1.0}}),
    _ablation("KD + triplet", {"triplet": {"weight": 1.0}}),
    _ablation("KD, top-1 and tail", {}, {"codec": "topk", "top_k": 1}),
    _ablation("KD, 12 draws", {}, {"codec": "sampled", "num_draws": 12}, kept=False),
)


def bench_fidelity(data: Path, output: Path, seeds: int, only_default: bool, say: Say) -> Tree:
    """The table; see the module. Raises DataError where `data` lacks a split."""
    for split in ("train", *SPLITS):
        if not (data / f"{split}.jsonl").is_file():
            raise DataError(f"expected {split}.jsonl (text, label) in {data}, found none: name another --data")
    rows = DEFAULTS if only_default else ROWS
    first = config_for(data, output, rows[0], 0)
    with cluster(first.cluster, needs(first), output):
        scores = {(row, seed): _scores(data, output, row, seed, say) for seed in range(seeds) for row in rows}
    return _table(rows, seeds, scores, first)


def config_for(data: Path, output: Path, row: Row, seed: int) -> Config:
    """MiniLM-L6, two epochs of fine-tuning (a third only makes it surer), then the recipe with what `row` changes.

    Products are in bfloat16 where the machine is fast at it.
    """
    fast = {"precision": "auto"}
    targets = row.targets | ({"cache": str(output / "targets")} if row.kept else {})
    return config_of({
        "name": f"{_slug(row)}-{seed}", "output_dir": str(output), "seed": seed, "task": "classification",
        "corpus": {
            "source": str(data / "train.jsonl"), "validation_source": str(data / "validation.jsonl"),
            "test_source": str(data / "test.jsonl"), "text_column": "text", "label_column": "label",
        },
        "tokens": {"length": 64, "buckets": [*range(8, 49, 4), 56]},
        "teacher": {"model": MINILM, **fast},
        "student": {"num_layers": row.num_layers, **row.student},
        "finetune": {"epochs": 2, "lr": 1e-4, "warmup_share": 0.1, **fast},
        "distill": {**fast, **row.distill, "targets": targets},
    })  # fmt: skip


def _slug(row: Row) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in row.name).split()
    return f"{'-'.join(words)}-{row.num_layers}"


def _scores(data: Path, output: Path, row: Row, seed: int, say: Say) -> Tree:
    """{split: {teacher, student}} of one run, made unless it is there."""
    config = config_for(data, output, row, seed)
    path = config.run_dir / "scores.json"
    run = prepare(config, lambda line: None)  # also refuses scores of another configuration
    if path.exists():
        found: Tree = json.loads(path.read_text())
        return found
    _share_teacher(output, seed, run)
    _share_general(output, row, run)
    distill(run)
    scores: Tree = {split: _score(run, split) for split in SPLITS}
    rundir.write_json(path, scores)
    test = scores["test"]
    say(f"{row.name}, {row.num_layers} layers, seed {seed}: {test['student']:.4f} of {test['teacher']:.4f}")
    return scores


def _share_teacher(output: Path, seed: int, run: Prepared) -> None:
    """One fine-tuning a seed: the first run of it makes the teacher, the others point to it."""
    _share((output / f"teacher-{seed}").resolve(), run.run_dir / rundir.TEACHER, lambda: finetune(run))


def _share_general(output: Path, row: Row, run: Prepared) -> None:
    """One general distillation a shape: neither the seed's teacher nor a row's losses have a say in it."""
    *_, link = links(run.config, run.teacher_dirs, run.run_dir)
    if (general := link.general) is not None:
        shape = digest([part.model_dump(mode="json") for part in (general.student, general.train)])
        shared = (output / f"general-{row.num_layers}-{shape}").resolve()
        _share(shared, run.run_dir / general.target, lambda: train_stage(run, lesson(run, general)))


def _share(shared: Path, own: Path, make: Callable[[], None]) -> None:
    if not shared.exists():
        make()
        own.rename(shared)
    if not own.exists():
        own.symlink_to(shared)


def _score(run: Prepared, split: Split) -> Tree:
    wanted = EvaluateConfig()
    spec = EvaluateSpec(
        run.config.task, run.store.path, split, None, run.labels, run.config.teacher.precision, wanted, cores()
    )
    student = Candidate("student", (str(run.run_dir / rundir.DISTILLED),), (1.0,), False)
    found = [teacher_of(run, timed=False), student]
    return {report.name: report.score.value for report in score(run.config, spec, found)}


# ---- the table


def _spread(values: list[float]) -> Tree:
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def _table(rows: tuple[Row, ...], seeds: int, scores: dict[tuple[Row, int], Tree], first: Config) -> Tree:
    lines = [_line(row, [scores[row, seed] for seed in range(seeds)]) for row in rows]
    teacher = _spread([scores[rows[0], seed]["test"]["teacher"] for seed in range(seeds)])
    result: Tree = {"teacher_score": teacher["mean"], "teacher_score_sd": teacher["sd"], "seeds": seeds, "rows": lines}
    assert first.distill is not None
    start = first.student.model_dump(mode="json", include={"start", "rule"})
    result["default_recipe"] = start | first.distill.model_dump(mode="json", exclude_none=True)
    for line in lines[: len(DEFAULTS)]:
        result[f"default_retention_{line['layers']}"] = line["test_retention"]["mean"]
        result[f"default_retention_{line['layers']}_sd"] = line["test_retention"]["sd"]
    return result


def _line(row: Row, scores: list[Tree]) -> Tree:
    line: Tree = {"name": row.name, "layers": row.num_layers}
    for split in SPLITS:
        line[split] = _spread([score[split]["student"] for score in scores])
        line[f"{split}_retention"] = _spread([score[split]["student"] / score[split]["teacher"] for score in scores])
    return line
