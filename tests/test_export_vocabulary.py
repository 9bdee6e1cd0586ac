"""A finished student whose vocabulary is cut when it is exported: what it says, what is saved, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sentences, write_jsonl
from test_pipeline import LANGUAGE_MODEL, config_for, quiet
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from raydistil import pipeline, rundir
from raydistil.cli import _guarded
from raydistil.config import Config
from raydistil.errors import ExportError
from raydistil.export.vocabulary import Cut, check_cut, cut_line
from raydistil.models import load_model, load_tokenizer
from raydistil.types import Score


@pytest.fixture(scope="module")
def run_dir(finished: tuple[Config, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, _ = finished
    path = tmp_path_factory.mktemp("cut") / "tiny"
    shutil.copytree(config.run_dir, path, ignore=shutil.ignore_patterns(rundir.LOCK, rundir.STUDENT))
    return path


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> dict[str, Any]:
    """`force`: with so few texts, numbers that are new to it cost more than they may."""
    return pipeline.export_run(run_dir, ("hf",), True, quiet, "corpus")


# ---- what it says


def test_texts_of_known_words_are_read_as_before(exported: dict[str, Any], run_dir: Path) -> None:
    student, whole = str(run_dir / rundir.STUDENT), str(run_dir / rundir.DISTILLED)
    tokenizer, before = load_tokenizer(student), load_tokenizer(whole)
    ids = [number for text in sentences(240) for number in before(text["text"])["input_ids"]]
    known = set(tokenizer.get_vocab())
    texts = [text["text"] for text in sentences(240) if known >= set(before.tokenize(text["text"]))]
    assert len(texts) > 150 and len(set(ids)) < len(tokenizer) < len(before)
    said = []
    for folder, reader in ((student, tokenizer), (whole, before)):
        with torch.inference_mode():
            rows = reader(texts, padding=True, return_tensors="pt")
            said.append(load_model(folder, "classification").eval()(**rows).logits)
    assert torch.allclose(*said, atol=1e-6)


def test_no_text_that_could_be_spelt_becomes_unknown(exported: dict[str, Any], run_dir: Path) -> None:
    tokenizer, before = (load_tokenizer(str(run_dir / name)) for name in (rundir.STUDENT, rundir.DISTILLED))
    text = "Zürich's größte Bäckerei verkauft 77 Brötchen; naïve 東京 привет!"
    assert before.unk_token not in before.tokenize(text)
    pieces = tokenizer.tokenize(text)
    assert tokenizer.unk_token not in pieces and pieces != before.tokenize(text)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == before.decode(before(text)["input_ids"])


def test_what_it_saves_and_costs_is_measured_and_said(exported: dict[str, Any], run_dir: Path) -> None:
    cut = exported["vocabulary"]
    weights = [(run_dir / name / "model.safetensors").stat().st_size for name in (rundir.DISTILLED, rundir.STUDENT)]
    assert list(cut["bytes"]) == weights and weights[1] < weights[0] / 2
    sizes = [len(load_tokenizer(str(run_dir / name))) for name in (rundir.DISTILLED, rundir.STUDENT)]
    assert list(cut["tokens"]) == sizes
    assert cut["scores"][0]["rows"] == cut["scores"][1]["rows"] == 15 and cut["split"] == "validation"
    card = (run_dir / rundir.STUDENT / "README.md").read_text()
    assert cut_line(cut) in card
    kept = json.loads((run_dir / rundir.STUDENT / "raydistil.json").read_text())
    (row,) = (model for model in kept["models"] if model["name"] == "exported")
    assert row["score"]["rows"] == 72 and row["size_bytes"] == weights[1]
    assert f"| exported | {row['parameters']:,} |" in card


@pytest.mark.slow
def test_onnx_files_are_made_of_the_one_that_was_cut(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _guarded(["export", str(run_dir), "--to", "onnx", "--vocabulary", "corpus", "--force", "--json"]) == 0
    said = capfd.readouterr()
    model, file = json.loads(said.out)["artefacts"]
    assert file["difference"] <= 1e-4 and file["score"] == model["score"]
    assert model["bytes"] == json.loads(said.out)["vocabulary"]["bytes"][1]
    assert "vocabulary: " in said.err


@pytest.mark.slow
def test_a_language_models_head_is_cut_with_it_and_known_words_cost_nothing(
    ray_cluster: None, tiny_teacher: str, tmp_path: Path
) -> None:
    rows = [{**row, "text": row["text"].partition(" is ")[2]} for row in sentences(240)]  # without their numbers
    corpus = write_jsonl(tmp_path / "items.jsonl", rows)
    shape: dict[str, Any] = {**LANGUAGE_MODEL, "export": {"vocabulary": "corpus"}}
    report = pipeline.run_all(config_for(tmp_path, tiny_teacher, corpus, distill={"epochs": 2}, **shape), quiet)
    tokens, scores = report["vocabulary"]["tokens"], report["vocabulary"]["scores"]
    student = load_model(report["student_dir"], "mlm")
    assert student.get_output_embeddings().weight.shape[0] == student.config.vocab_size == tokens[1] < tokens[0]
    assert scores[0] == scores[1] and scores[0]["metric"] == "masked accuracy"


# ---- what is refused


def test_one_that_loses_too_much_is_refused() -> None:
    before, after = (Score("accuracy", value, 0.0, 1.0, 1000) for value in (0.9, 0.89))
    check_cut(Cut((9, 5), (90, 50), "validation", (after, before)), 0.005)
    check_cut(Cut((9, 5), (90, 50), "validation", (before, before)), 0.005)
    expected = r"vocabulary: expected at most 0.005 of the accuracy lost on 1,000 validation items, got 0.0100 \(0.9000"
    with pytest.raises(ExportError, match=expected):
        check_cut(Cut((9, 5), (90, 50), "validation", (before, after)), 0.005)


def test_a_tokenizer_that_cannot_be_cut_is_named(
    run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny"
    shutil.copytree(run_dir, path, ignore=shutil.ignore_patterns(rundir.LOCK, rundir.STUDENT))
    words = {"[PAD]": 0, "[UNK]": 1, "item": 2, "is": 3, "and": 4, "[CLS]": 5, "[SEP]": 6, "[MASK]": 7}
    Tokenizer(WordLevel(words, unk_token="[UNK]")).save(str(path / rundir.DISTILLED / "tokenizer.json"))
    shape = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (path / rundir.DISTILLED / "tokenizer_config.json").write_text(json.dumps(shape))
    assert _guarded(["export", str(path), "--to", "hf", "--vocabulary", "corpus"]) == 2
    *_, last = capfd.readouterr().err.splitlines()
    assert last.startswith("error: expected a tokenizer of kind WordPiece, BPE, Unigram to prune, got WordLevel: keep")
    assert not (path / rundir.STUDENT).exists()
