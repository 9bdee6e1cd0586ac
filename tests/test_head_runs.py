"""Whole runs of words with classes, questions and vectors: trained, scored, exported, loaded by others."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from conftest import ONE_THREAD, write_jsonl
from made import HEADS, ROWS, TAGS, asked, write_teacher
from onnxruntime import InferenceSession
from test_pipeline import TRAIN, quiet
from transformers import AutoModel, AutoModelForQuestionAnswering, AutoModelForTokenClassification, AutoTokenizer

from raydistil import pipeline, rundir
from raydistil.config import config_of
from raydistil.export.onnx import OPSET
from raydistil.heads import Inputs
from raydistil.models import HeadedEncoder, load_model
from raydistil.types import Format, Task

pytestmark = pytest.mark.slow

METRICS: dict[Task, str] = {
    "token_classification": "entity F1", "question_answering": "F1", "embedding": "retrieval accuracy",
}  # fmt: skip
FORMATS: tuple[Format, ...] = ("hf", "bf16", "onnx", "fp16", "int8", "int8-static")
OUTPUTS: dict[Task, list[str]] = {
    "token_classification": ["logits"], "question_answering": ["start_logits", "end_logits"],
    "embedding": ["token_embeddings", "sentence_embedding"],
}  # fmt: skip


@pytest.fixture(scope="module", params=HEADS)
def done(request: pytest.FixtureRequest, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(task, its report, what was exported)."""
    task: Task = request.param
    folder = tmp_path_factory.mktemp(task)
    training = {**TRAIN, "general": {"epochs": 0}, "epochs": 8 if task == "embedding" else 4}
    tree: dict[str, Any] = {
        "name": "tiny", "output_dir": str(folder), "task": task,
        "corpus": {"source": str(write_jsonl(folder / "rows.jsonl", ROWS[task](240))), "test_share": 0.3},
        "tokens": {"length": 48, "buckets": [32]}, "teacher": {"model": write_teacher(folder / "teacher", task)},
        "student": {"layers": [0, 2]}, "cluster": ONE_THREAD, "distill": training,
        "evaluate": {"latency_rounds": 3, "latency_length": 16},
    }  # fmt: skip
    if task != "embedding":
        tree["finetune"] = {**TRAIN, "epochs": 24}
    config = config_of(tree)
    report = pipeline.run_all(config, quiet)
    return task, report, pipeline.export_run(config.run_dir, FORMATS, True, quiet)


def test_the_score_is_that_of_the_field(done: Any) -> None:
    task, report, _ = done
    assert report["metric"] == METRICS[task]
    assert 0 < report["student_score"] <= 1 and report["student_params"] < report["teacher_params"]
    if task == "token_classification":
        assert report["teacher_score"] > 0.9 and report["teacher_accuracy"] > 0.9
    if task == "question_answering":
        assert 0 <= report["teacher_exact_match"] <= report["teacher_score"]
    if task == "embedding":
        run_dir = Path(report["student_dir"]).parent
        folders = [run_dir.parent / "teacher", run_dir / rundir.STUDENT_INIT, run_dir / rundir.DISTILLED]
        encoders = [HeadedEncoder(load_model(str(folder), task), task, "float32").frozen() for folder in folders]
        taught, before, after = (encoder(Inputs(*tiny.ids(9, 12)))[1] for encoder in encoders)
        assert (taught - after).square().mean() < 0.5 * (taught - before).square().mean()


def test_every_artefact_says_what_the_student_says(done: Any) -> None:
    task, _, exported = done
    made = {each["format"]: each for each in exported["artefacts"]}
    assert tuple(made) == FORMATS
    assert 0 <= made["onnx"]["difference"] <= 1e-4 < made["int8"]["difference"]
    assert made["hf"]["score"] == made["onnx"]["score"] and made["hf"]["score"]["metric"] == METRICS[task]
    assert all(made[name]["bytes"] < made["onnx"]["bytes"] for name in ("fp16", "int8", "int8-static"))
    assert made["bf16"]["bytes"] < made["hf"]["bytes"] and 0 < made["bf16"]["difference"] < 1


def test_a_file_runs_wherever_onnxruntime_does(done: Any) -> None:
    """Of any batch and length; with the field's names of inputs and outputs, in one opset."""
    task, _, exported = done
    path = Path(exported["student_dir"]) / "onnx" / "model.onnx"
    proto = onnx.load(str(path))
    assert [(each.domain, each.version) for each in proto.opset_import] == [("", OPSET)]
    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    typed = ["token_type_ids"] if task == "question_answering" else []
    assert [given.name for given in session.get_inputs()] == ["input_ids", "attention_mask", *typed]
    assert [made.name for made in session.get_outputs()] == OUTPUTS[task]
    for rows, length in ((1, 5), (3, 17)):
        ids = np.full((rows, length), 7)
        shown = {
            name: ids if name == "input_ids" else np.ones_like(ids) for name in ["input_ids", "attention_mask", *typed]
        }
        out = dict(zip(OUTPUTS[task], session.run(None, shown), strict=True))
        assert all(len(part) == rows for part in out.values())
        if task == "embedding":
            np.testing.assert_allclose(np.linalg.norm(out["sentence_embedding"], axis=-1), 1, atol=1e-5)


def test_the_student_loads_with_transformers_alone(done: Any) -> None:
    task, _, exported = done
    folder = exported["student_dir"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if task == "token_classification":
        model = AutoModelForTokenClassification.from_pretrained(folder)
        assert tuple(model.config.id2label.values()) == TAGS
        said = model(**tokenizer("item3 is iron near apple", return_tensors="pt")).logits.argmax(-1)[0]
        names = [model.config.id2label[int(n)] for n in said]
        assert "B-metal" in names and "B-fruit" in names
    elif task == "question_answering":
        row = asked(1)[0]
        model = AutoModelForQuestionAnswering.from_pretrained(folder)
        assert model(**tokenizer(row["question"], row["context"], return_tensors="pt")).start_logits.shape[0] == 1
    else:
        vectors = AutoModel.from_pretrained(folder)(**tokenizer("iron", return_tensors="pt")).last_hidden_state
        assert torch.isfinite(vectors).all()
        assert (Path(folder) / "1_Pooling" / "config.json").exists()


def test_the_card_says_how_to_use_it(done: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Its lines of Python run as they stand."""
    task, _, exported = done
    card = (Path(exported["student_dir"]) / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/directory", exported["student_dir"])
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.strip()
    assert METRICS[task] in card and "int8" in card
