"""Teacher, assistants, student: each link's student teaches the next."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MINILM, ONE_THREAD

from raydistil import pipeline
from raydistil.chain import links
from raydistil.config import Config, config_of
from raydistil.errors import ModelError
from raydistil.models import load_model
from raydistil.prepare import check_models, outlines


def config(folder: Path, teacher: str, corpus: Path, **changes: Any) -> Config:
    tree: dict[str, Any] = {
        "name": "chain", "output_dir": str(folder), "task": "classification",
        "corpus": {"source": str(corpus), "test_share": 0.3}, "tokens": {"length": 32, "buckets": [16]},
        "teacher": {"model": teacher}, "student": {"num_layers": 1}, "cluster": ONE_THREAD,
        "assistants": [{"num_layers": 3, "epochs": 3}, {"layers": [0, 2], "lr": 1e-3}],
        "finetune": {"epochs": 4, "lr": 3e-3, "micro_batch_size": 8},
        "distill": {"epochs": 2, "lr": 3e-3, "micro_batch_size": 8},
        "evaluate": {"latency_rounds": 3, "latency_length": 16},
    }  # fmt: skip
    return config_of(tree | changes)


def test_each_link_is_taught_by_the_one_before(tmp_path: Path, corpus_file: Path) -> None:
    made = list(links(config(tmp_path, "hub/name", corpus_file), ("/t",), Path("/run")))
    assert [(link.stage, link.teacher, link.untuned) for link in made] == [
        ("assistant-1", "/t", "hub/name"),
        ("assistant-2", "/run/assistant-1", "/run/assistant-1-init"),
        ("distill", "/run/assistant-2", "/run/assistant-2-init"),
    ]
    assert [(link.train.epochs, link.train.lr) for link in made] == [(3, 3e-3), (2, 1e-3), (2, 3e-3)]
    assert [(link.init, link.target) for link in made] == [
        ("assistant-1-init", "assistant-1"), ("assistant-2-init", "assistant-2"), ("student_init", "distilled"),
    ]  # fmt: skip
    assert {link.student.start for link in made} == {"checkpoint"}
    general = [link.general for link in made if link.general]
    assert [(link.stage, link.teacher, link.init, link.target) for link in general] == [
        ("assistant-1-general", "hub/name", "assistant-1-general-init", "assistant-1-general"),
        ("assistant-2-general", "/run/assistant-1-init", "assistant-2-general-init", "assistant-2-general"),
        ("distill-general", "/run/assistant-2-init", "distill-general-init", "distill-general"),
    ]
    assert {(link.train.epochs, link.train.lr, link.train.loss.kd) for link in general} == {(6, 5e-4, 0)}


def test_a_student_without_a_teacher_has_no_general_distillation(tmp_path: Path, corpus_file: Path) -> None:
    *_, last = links(config(tmp_path, "hub/name", corpus_file), ("/t",), Path("/run"))
    alone = last.ungeneral()
    assert last.general is not None and alone.general is None
    assert alone.init != last.init
    assert (alone.student, alone.target) == (last.student, last.target)
    assert alone.ungeneral() == alone


def test_without_assistants_there_is_one_link(tmp_path: Path, corpus_file: Path) -> None:
    (only,) = links(config(tmp_path, "hub/name", corpus_file, assistants=[]), ("/t",), Path("/run"))
    assert (only.stage, only.teacher, only.target) == ("distill", "/t", "distilled")


def test_layers_of_the_fine_tuned_learn_what_it_did(tmp_path: Path, corpus_file: Path) -> None:
    student = {"num_layers": 1, "start": "finetuned"}
    *_, last = links(config(tmp_path, "hub/name", corpus_file, student=student), ("/t",), Path("/run"))
    assert last.general is not None
    assert last.general.teacher == last.teacher == "/run/assistant-2"


def test_the_shapes_of_a_chain(tmp_path: Path, corpus_file: Path) -> None:
    depths = [made.config.num_hidden_layers for made in outlines(config(tmp_path, MINILM, corpus_file), 3)]
    assert depths == [6, 3, 2, 1]


@pytest.mark.parametrize(
    ("assistants", "student", "words"),
    [
        ([{"num_layers": 7}], {"num_layers": 2}, "6"),
        ([{"num_layers": 2}], {"num_layers": 3}, "2"),
        ([{"layers": [0, 5]}], {"layers": [5]}, "2"),
    ],
)
def test_layers_are_those_of_the_model_before(
    tmp_path: Path, corpus_file: Path, assistants: Any, student: Any, words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        check_models(config(tmp_path, MINILM, corpus_file, assistants=assistants, student=student))


@pytest.mark.slow
def test_a_chain_ends_in_the_student(ray_cluster: None, tiny_teacher: str, corpus_file: Path, tmp_path: Path) -> None:
    """Every kind of loss on the way, a narrower student with projections at its end."""
    loss = {
        "task": 0.5, "hidden": {}, "pkd": {}, "minilm": {"relation_heads": 4}, "triplet": {"guided": False},
        "contrastive": {}, "schedule": {"task": {"linear": [0.5, 1.0]}},
    }  # fmt: skip
    chosen = config(
        tmp_path, tiny_teacher, corpus_file, student={"num_layers": 1, "hidden_size": 16, "ffn_size": 32},
        assistants=[{"num_layers": 3, "epochs": 1}],
        distill={"epochs": 2, "lr": 3e-3, "micro_batch_size": 8, "loss": loss, "general": {"epochs": 1}},
    )  # fmt: skip
    said: list[str] = []
    report = pipeline.run_all(chosen, said.append)
    assert [model["name"] for model in report["models"]] == ["teacher", "student", "assistant-1"]
    taught = ["assistant-1", "distill"]
    assert list(report["stages"]) == ["finetune", *(f"{name}{kind}" for name in taught for kind in ("-general", ""))]
    assert set(report["stages"]["distill-general"]["final_losses"]) == {"loss", "hidden"}
    start, teacher, general = (
        load_model(str(chosen.run_dir / name), "classification")
        for name in ("assistant-1-init", "teacher", "assistant-1-general")
    )
    assert torch.equal(start.classifier.weight, teacher.classifier.weight)
    assert torch.equal(start.get_input_embeddings().weight, general.get_input_embeddings().weight)
    terms = {"loss", "kd", "task", "hidden", "pkd", "minilm", "triplet", "contrastive"}
    assert set(report["stages"]["distill"]["final_losses"]) == terms
    student = load_model(report["student_dir"], "classification")
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (1, 16)
    again: list[str] = []
    pipeline.run_all(chosen, again.append)
    assert sum("done before" in line for line in again) == 5
