"""What a training is made of before it starts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import LANGUAGE_MODEL, config_for, quiet

from raydistil import pipeline
from raydistil.chain import links
from raydistil.config.train import DEFAULT_ROWS
from raydistil.models import shape_of
from raydistil.pipeline import lesson
from raydistil.prepare import prepare
from raydistil.source import MicroBatches
from raydistil.stages import Training, manifest_of, train_run

MASKED, LENGTH = 0.15, 32
BUDGET = 100


def flops(shape: Any, num_layers: int, compared: float) -> float:
    """Of BERT, forward: four D x D matrices and two D x F ones a layer, its attention, and the head."""
    width, inner, vocabulary = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    layer = 2 * (4 * width * width + 2 * width * inner) + 4 * LENGTH * width
    return num_layers * layer + compared * 2 * (width * width + width * vocabulary)


def test_a_budget_of_tokens_is_used_up_in_every_bucket(able_classifier: str, corpus_file: Path, tmp_path: Path) -> None:
    train = {"micro_batch_tokens": BUDGET, "micro_batch_size": DEFAULT_ROWS}
    run = prepare(
        config_for(tmp_path, able_classifier, corpus_file, finetune=None, evaluate=None, distill=train), quiet
    )
    (link,) = links(run.config, run.teacher_dirs, run.run_dir)
    planned = train_run(run, lesson(run, link))
    source, manifest = MicroBatches(planned.source), planned.source.manifest
    made = [source.make(index).input_ids_BL.shape for index in range(manifest.per_epoch)]
    full = {length: BUDGET // length for length in run.store.lengths("train")}
    assert len(full) > 1
    assert all(rows <= full[length] for rows, length in made)
    assert sum(rows < full[length] for rows, length in made) <= len(full)
    assert planned.worker.mean_rows == sum(rows for rows, _ in made) / len(made)


def test_checkpoints_are_of_the_content_of_a_corpus(tiny_teacher: str, corpus_file: Path, tmp_path: Path) -> None:
    found = {}
    for name, text in {"same": "", "more": '{"text": "item 999 is gold", "label": "metal"}\n'}.items():
        corpus = tmp_path / "items.jsonl"
        corpus.write_text(corpus_file.read_text() + text)
        shape = config_for(tmp_path / name, tiny_teacher, corpus, **LANGUAGE_MODEL, evaluate=None)
        run = prepare(shape, quiet)
        (link,) = links(run.config, run.teacher_dirs, run.run_dir)
        found[name] = train_run(run, lesson(run, link)).save.run_hash
    assert found["same"] != found["more"]


def test_checkpoints_are_of_the_content_of_the_teacher(tiny_teacher: str, corpus_file: Path, tmp_path: Path) -> None:
    teacher, found = Path(shutil.copytree(tiny_teacher, tmp_path / "teacher")), list[str]()
    run = prepare(config_for(tmp_path, str(teacher), corpus_file, **LANGUAGE_MODEL, evaluate=None), quiet)
    (link,) = links(run.config, run.teacher_dirs, run.run_dir)
    for _ in range(2):
        found += [train_run(run, lesson(run, link)).save.run_hash for _ in range(2)]
        weights = bytearray((teacher / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (teacher / "model.safetensors").write_bytes(weights)
    assert found[0] == found[1] != found[2] == found[3]


def test_the_baseline_has_as_many_micro_batches_as_the_student(
    able_classifier: str, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them with rows, wherever the labels are."""
    rows = [json.loads(line) for line in corpus_file.read_text().splitlines()]
    for row in rows:
        row["label"] = row["label"] if len(row["text"]) < 30 else None
    corpus = tmp_path / "items.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"micro_batch_tokens": BUDGET, "micro_batch_size": DEFAULT_ROWS, "epochs": 3}
    run = prepare(config_for(tmp_path, able_classifier, corpus, finetune=None, distill=train), quiet)
    made: list[Training] = []
    monkeypatch.setattr(pipeline, "train_stage", lambda _, training: made.append(training))
    pipeline.train_baseline(run)
    (link,) = links(run.config, run.teacher_dirs, run.run_dir)
    (training,), student = made, train_run(run, lesson(run, link)).source.manifest
    manifest = manifest_of(run, training.config, False, training.seed)
    assert training.micro_batches == student.num_micro_batches <= manifest.num_micro_batches
    assert manifest.num_micro_batches - manifest.per_epoch < student.num_micro_batches


@pytest.mark.parametrize("threads", [1, 2])
def test_the_teachers_products_count_where_the_student_is(
    threads: int, tiny_teacher: str, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them on the same cores; on cores of its own, those of its head, which are made beside the student."""
    monkeypatch.setattr("raydistil.plan.cores", lambda: 2)
    placed = {"cluster": {"student_threads": threads, "teacher_threads": threads}}
    run = prepare(config_for(tmp_path, tiny_teacher, corpus_file, **LANGUAGE_MODEL, evaluate=None, **placed), quiet)
    (link,) = links(run.config, run.teacher_dirs, run.run_dir)
    worker = train_run(run, lesson(run, link)).worker
    teacher = shape_of(tiny_teacher, "teacher.model")
    depth = teacher.num_hidden_layers if threads == 2 else 0
    expected = 3 * flops(teacher, 2, MASKED) + flops(teacher, depth, MASKED)
    assert worker.flops_per_token == pytest.approx(expected, rel=0.01)
