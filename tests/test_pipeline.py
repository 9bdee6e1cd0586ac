"""The chain end to end on a tiny teacher: real Ray Data, Ray Train and DeepSpeed, made data."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ONE_THREAD

from raydistil import pipeline, rundir
from raydistil.config import Config, EvaluateConfig
from raydistil.errors import DivergedError, StorageError
from raydistil.models import load_model, load_tokenizer
from raydistil.prepare import make_store
from raydistil.specs import TrainRun
from raydistil.tokens import TokenStore
from raydistil.types import StepMetrics

TRAIN = {"micro_batch_size": 8, "lr": 3e-3}
LANGUAGE_MODEL: dict[str, Any] = {
    "task": "mlm", "corpus": {"labelled_share": 1.0}, "tokens": {"length": 32, "buckets": []}, "finetune": None,
}  # fmt: skip


def config_for(folder: Path, teacher: str, corpus: Path, /, **changes: Any) -> Config:
    tree: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(folder),
        "task": "classification",
        "corpus": {"source": str(corpus), "test_share": 0.3, "labelled_share": 0.8},
        "tokens": {"length": 32, "buckets": [16]},
        "teacher": {"model": teacher},
        "student": {"layers": [0, 2]},
        "cluster": ONE_THREAD,
        "finetune": {**TRAIN, "epochs": 20},
        "distill": {**TRAIN, "epochs": 2},
        "evaluate": {"latency_rounds": 3, "latency_length": 16},
    }
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
    return Config.model_validate(tree)


def quiet(line: str) -> None:
    """Takes what the run says and keeps none of it."""


def losses(run_dir: Path, stage: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["losses"]["loss"]) for line in lines if line["stage"] == stage]


def test_the_report_holds_what_was_promised(finished: tuple[Config, dict[str, Any]]) -> None:
    config, report = finished
    assert report["teacher_score"] > 0.9
    assert report["retention"] == report["student_score"] / report["teacher_score"]
    assert report["student_params"] < report["teacher_params"]
    assert 0 < report["student_flops_per_token"] < report["teacher_flops_per_token"]
    assert {"speedup", "wall_s", "student_dir"} <= report.keys()
    written = json.loads((config.run_dir / rundir.REPORT).read_text())
    assert written == json.loads(json.dumps(report, default=str))


def test_the_teacher_was_built_once_and_every_position_trained(finished: tuple[Config, dict[str, Any]]) -> None:
    config, report = finished
    distill = report["stages"]["distill"]
    assert distill["teacher_builds"] == 1
    assert distill["micro_batches"] == distill["steps"]
    assert config.distill is not None and distill["steps"] % config.distill.epochs == 0
    assert not (config.run_dir / "checkpoints" / "distill").exists()


def test_rows_without_a_label_reach_the_student(finished: tuple[Config, dict[str, Any]]) -> None:
    config, report = finished
    counts = TokenStore(make_store(config)).meta.splits["train"]
    assert 0 < counts.labelled_rows < counts.rows
    assert report["stages"]["distill"]["rows"] == counts.rows


def test_the_student_loads_with_transformers_alone(finished: tuple[Config, dict[str, Any]]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    _, report = finished
    model = AutoModelForSequenceClassification.from_pretrained(report["student_dir"])
    tokenizer = AutoTokenizer.from_pretrained(report["student_dir"])
    logits = model(**tokenizer("item 3 is iron and tin", return_tensors="pt")).logits
    assert model.config.id2label[int(logits.argmax())] == "metal"


def test_a_finished_run_is_not_trained_again(finished: tuple[Config, dict[str, Any]]) -> None:
    """And of what its driver was killed in the middle of clearing up, nothing stays."""
    config, report = finished
    left = rundir.checkpoints_of(config, rundir.DISTILL)
    left.write("step-1/state.json", b"{}")
    said: list[str] = []
    again = pipeline.run_all(config, said.append)
    assert again["student_score"] == report["student_score"]
    assert sum("done before" in line for line in said) == 1
    assert left.local is not None and not left.local.exists()


def test_another_runs_directory_is_refused(finished: tuple[Config, dict[str, Any]]) -> None:
    config, _ = finished
    with pytest.raises(StorageError, match="seed: 0 there, 1 here"):
        pipeline.prepare(config.model_copy(update={"seed": 1}), quiet)
    with pytest.raises(StorageError, match="the content of the corpus has changed since"):
        rundir.claim(config, "other rows")
    placed = config.model_copy(update={"cluster": config.cluster.model_copy(update={"teachers": (1, 2)})})
    pipeline.prepare(placed, quiet)


def stop_at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ask the run to stop as a Ctrl-C does, once it has shown `step`."""
    from raydistil import train
    from raydistil.progress import Wish
    from raydistil.report import LiveLine

    actors: list[Any] = []
    show, make = LiveLine.show, train._progress_of

    def showing(line: LiveLine, metrics: StepMetrics) -> None:
        show(line, metrics)
        if metrics.step >= step:
            actors[-1].wish.remote(Wish.STOP)

    def making(run: TrainRun) -> Any:
        actors.append(make(run))
        return actors[-1]

    monkeypatch.setattr(LiveLine, "show", showing)
    monkeypatch.setattr(train, "_progress_of", making)


@pytest.mark.slow
def test_two_workers_under_zero_2_train_every_position_once(
    ray_cluster: None, tiny_teacher: str, corpus_file: Path, tmp_path: Path
) -> None:
    config = config_for(
        tmp_path, tiny_teacher, corpus_file, **LANGUAGE_MODEL, evaluate=None, cluster={"students": 2},
        distill={"zero_stage": 2, "accumulation": 2, "freeze_embeddings": True},
    )  # fmt: skip
    pipeline.run_all(config, quiet)
    before, after = (
        load_model(str(config.run_dir / name), "mlm").state_dict() for name in ("student_init", "distilled")
    )
    frozen = {name for name, weight in after.items() if torch.equal(weight, before[name])}
    assert {name for name in frozen if name.endswith("weight")} == {
        "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight",
    }  # fmt: skip
    summary = rundir.read_summary(config.run_dir, "distill")
    assert summary is not None
    assert summary["steps"] * 2 == summary["micro_batches"]
    assert summary["teacher_builds"] == 1


@pytest.mark.slow
def test_a_teacher_labels_texts_that_have_no_labels(
    ray_cluster: None, able_classifier: str, corpus_file: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.jsonl"
    rows = [json.loads(line) for line in corpus_file.read_text().splitlines()]
    texts.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
    said: list[str] = []
    asked = config_for(
        tmp_path, able_classifier, texts, corpus={"labelled_share": 1.0}, finetune=None, evaluate=None,
        distill={"epochs": 8},
    )  # fmt: skip
    pipeline.run_all(asked, said.append)
    assert "no label column: the teacher alone labels the texts (corpus.label_column names one)" in said
    assert "classes: fruit, metal, river" in said
    student, teacher = (
        load_model(str(path), "classification").eval() for path in (asked.run_dir / "student", able_classifier)
    )
    batch = load_tokenizer(able_classifier)([row["text"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        same = student(**batch).logits.argmax(-1) == teacher(**batch).logits.argmax(-1)
    assert same.float().mean() > 0.9
    assert student.config.id2label == teacher.config.id2label


@pytest.mark.slow
def test_a_training_that_has_lost_its_way_ends_before_it_is_saved(
    ray_cluster: None, able_classifier: str, corpus_file: Path, tmp_path: Path
) -> None:
    asked = config_for(tmp_path, able_classifier, corpus_file, finetune=None, distill={"lr": 1e30})
    with pytest.raises(DivergedError, match=r"expected a finite loss, got .*nan or inf .*step \d+ of .*: lower lr"):
        pipeline.run_all(asked, quiet)
    assert not (asked.run_dir / "distilled").exists()


@pytest.mark.slow
def test_fine_tuning_and_no_teacher_student_learn_from_the_labelled_rows(
    ray_cluster: None, tiny_teacher: str, corpus_file: Path, tmp_path: Path
) -> None:
    wanted = EvaluateConfig(no_teacher_baseline=True, latency_rounds=3, latency_length=16)
    asked = config_for(tmp_path, tiny_teacher, corpus_file).model_copy(update={"evaluate": wanted})
    report = pipeline.run_all(asked, quiet)
    stages, labelled = report["stages"], TokenStore(make_store(asked)).meta.splits["train"].labelled_rows
    assert report["teacher_score"] > 0.9
    assert stages["no-teacher"]["steps"] == stages["distill"]["steps"]
    assert stages["no-teacher"]["rows"] == stages["finetune"]["rows"] == labelled
    assert report["no_teacher_score"] > 0.5
    other = wanted.model_copy(update={"baseline_lr": 1e-6})
    again = pipeline.run_all(asked.model_copy(update={"evaluate": other}), quiet)
    assert again["stages"]["no-teacher"]["lr"] == 1e-6
    learned, stood = (losses(asked.run_dir, f"no-teacher-{lr}")[-1] for lr in (0.003, 1e-6))
    assert learned[0] == stood[0] and learned[1] < stood[1]


@pytest.mark.slow
def test_masked_lm_distillation_and_its_baselines(
    ray_cluster: None, tiny_teacher: str, corpus_file: Path, tmp_path: Path
) -> None:
    config = config_for(
        tmp_path, tiny_teacher, corpus_file, **LANGUAGE_MODEL, student={"family": "distilbert"},
        distill={"epochs": 8}, evaluate={"no_teacher_baseline": True},
    )  # fmt: skip
    report = pipeline.run_all(config, quiet)
    assert report["student_mlm_loss"] < report["untrained_mlm_loss"]
    assert report["no_teacher_mlm_loss"] < report["untrained_mlm_loss"]
    shape = json.loads((Path(report["student_dir"]) / "config.json").read_text())
    assert shape["architectures"] == ["DistilBertForMaskedLM"]
