"""ONNX files of a real student: what they say, what they are worth, and what is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from onnxruntime import InferenceSession
from test_pipeline import LANGUAGE_MODEL, config_for, quiet
from transformers import AutoModelForSequenceClassification

from raydistil import export as exporting
from raydistil import pipeline, rundir
from raydistil import prepare as preparing
from raydistil.cli import _guarded
from raydistil.config import Config
from raydistil.errors import ConfigError, DataError, ExportError, StorageError
from raydistil.export import MOST_LOST, ONNX, formats_of
from raydistil.export import measure as measuring
from raydistil.export.measure import ROWS, TIMED_TOKENS, difference, padded, real_rows, timed_rows
from raydistil.export.onnx import OPSET, OnnxModel, to_onnx
from raydistil.export.smaller import to_int8
from raydistil.heads import Inputs
from raydistil.models import HeadedEncoder
from raydistil.types import Format, Task, TokenBatch

WHOLE: tuple[Format, ...] = ("hf", "onnx", "int8")


@pytest.fixture(scope="module")
def run_dir(finished: tuple[Config, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a classifier, to be spoilt."""
    config, _ = finished
    path = tmp_path_factory.mktemp("moved") / "another"
    shutil.copytree(config.run_dir, path, ignore=shutil.ignore_patterns(rundir.LOCK))
    return path


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> dict[str, Any]:
    """`force`: so tiny a student is no faster in 8 bits."""
    return pipeline.export_run(run_dir, WHOLE, True, quiet)


def logits(path: Path, task: Task, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    (made,) = OnnxModel(path, 1, task).outputs(Inputs(ids, mask))
    return made


# ---- the files


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("bert", "classification"),
        pytest.param("bert", "mlm", marks=pytest.mark.slow),
        pytest.param("roberta", "classification", marks=pytest.mark.slow),
        pytest.param("mpnet", "mlm", marks=pytest.mark.slow),
        pytest.param("electra", "classification", marks=pytest.mark.slow),
    ],
)
def test_a_file_says_what_its_model_says_for_any_batch_and_length(tmp_path: Path, family: str, task: Any) -> None:
    model = tiny.model(tiny.FAMILIES[family], task)
    to_onnx(model, task, tmp_path / "model.onnx")
    for rows, length in ((1, 1), (2, 9), (5, 20)):
        ids_BL, mask_BL = tiny.ids(rows, length) if length > 3 else (torch.full((1, 1), 7), torch.ones(1, 1).bool())
        with torch.inference_mode():
            expected = model(input_ids=ids_BL, attention_mask=mask_BL).logits
        made = logits(tmp_path / "model.onnx", task, ids_BL, mask_BL)
        where = mask_BL if task == "mlm" else slice(None)
        torch.testing.assert_close(made[where], expected[where], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_an_operation_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def set_attn_implementation(self, name: str) -> None:
            pass

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.special.bessel_j0(input_ids.float()))

    with pytest.raises(ExportError, match=r"expected a model that ONNX can say, Odd is none \(.*bessel_j0.*\): export"):
        to_onnx(Odd(), "classification", tmp_path / "model.onnx")  # type: ignore[arg-type]
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.slow
def test_a_file_is_one_that_runtimes_in_browsers_take(exported: dict[str, Any]) -> None:
    """Of one opset, no other domain's operations, all weights inside."""
    proto = onnx.load(str(Path(exported["student_dir"]) / ONNX), load_external_data=False)
    assert [(each.domain, each.version) for each in proto.opset_import] == [("", OPSET)]
    assert not any(tensor.external_data for tensor in proto.graph.initializer)
    assert not proto.functions and {node.domain for node in proto.graph.node} == {""}
    names = [[value.name for value in values] for values in (proto.graph.input, proto.graph.output)]
    assert names == [["input_ids", "attention_mask"], ["logits"]]


@pytest.mark.slow
def test_embeddings_and_matrices_are_in_eight_bits(tmp_path: Path) -> None:
    """What is left in 32: norms, biases and scales."""
    to_onnx(tiny.model(tiny.FAMILIES["bert"], "classification"), "classification", tmp_path / "model.onnx")
    to_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.onnx", "model.onnx"]
    proto = onnx.load(str(tmp_path / "int8.onnx"))
    wide = [
        t
        for t in proto.graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1 and min(t.dims) > 1
    ]
    assert [tensor.name for tensor in wide] == []
    large = [t for t in proto.graph.initializer if t.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)]
    assert sum(int(np.prod(t.dims)) for t in large) > 40 * 16


# ---- the directory


@pytest.mark.slow
def test_the_directory_is_in_hub_layout_with_onnx_beside(exported: dict[str, Any], run_dir: Path) -> None:
    student = run_dir / rundir.STUDENT
    assert student.samefile(exported["student_dir"])
    assert {path.name for path in (student / "onnx").iterdir()} == {"model.onnx", "model_int8.onnx"}
    model = AutoModelForSequenceClassification.from_pretrained(student).eval()
    ids_BL, mask_BL = tiny.ids()
    ids_BL = ids_BL % 20
    with torch.inference_mode():
        expected = model(input_ids=ids_BL, attention_mask=mask_BL).logits.numpy()
    session = InferenceSession(str(student / ONNX), providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {"input_ids": ids_BL.numpy(), "attention_mask": mask_BL.long().numpy()})
    np.testing.assert_allclose(made, expected, atol=1e-4)


@pytest.mark.slow
def test_every_artefact_is_measured_and_stands_on_the_card(exported: dict[str, Any], run_dir: Path) -> None:
    made = {each["format"]: each for each in exported["artefacts"]}
    assert list(made) == ["hf", "onnx", "int8"]
    assert made["hf"]["difference"] is None
    assert 0 <= made["onnx"]["difference"] <= 1e-4 < made["int8"]["difference"]
    assert made["hf"]["score"] == made["onnx"]["score"]
    assert made["int8"]["bytes"] < made["onnx"]["bytes"]
    for each in made.values():
        assert (run_dir / rundir.STUDENT / each["file"]).stat().st_size == each["bytes"]
        assert 0 < each["latency_p50_ms"] <= each["latency_p99_ms"] and each["rows_s"] > 0 and each["peak_mib"] > 1
    card = (run_dir / rundir.STUDENT / "README.md").read_text()
    assert all(f"| {each['file']} |" in card for each in made.values())
    assert json.loads((run_dir / rundir.STUDENT / "raydistil.json").read_text())["artefacts"] == json.loads(
        json.dumps(exported["artefacts"])
    )


# ---- what is refused


def spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantizer that spoils the weights."""

    def broken(source: Path, path: Path) -> None:
        proto = onnx.load(str(source))
        for tensor in proto.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
                values = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(-values, tensor.name))
        onnx.save(proto, str(path))

    monkeypatch.setattr(exporting, "to_int8", broken)


@pytest.mark.slow
def test_one_that_loses_too_much_is_refused_and_what_was_there_stays(
    exported: dict[str, Any], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (run_dir / rundir.STUDENT).rglob("*")}
    spoilt(monkeypatch)
    with pytest.raises(ExportError, match=rf"int8: expected at most {MOST_LOST} of the accuracy lost .* --force"):
        pipeline.export_run(run_dir, WHOLE, False, quiet)
    assert before == {path: path.stat().st_mtime_ns for path in (run_dir / rundir.STUDENT).rglob("*")}
    assert not list(run_dir.glob(".student*"))


@pytest.mark.slow
def test_an_export_that_is_cut_short_leaves_what_was_there(
    exported: dict[str, Any], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(source: Path, path: Path) -> None:
        raise KeyboardInterrupt

    before = {path: path.stat().st_mtime_ns for path in (run_dir / rundir.STUDENT).rglob("*")}
    monkeypatch.setattr(exporting, "to_int8", cut)
    with pytest.raises(KeyboardInterrupt):
        pipeline.export_run(run_dir, WHOLE, False, quiet)
    assert before == {path: path.stat().st_mtime_ns for path in (run_dir / rundir.STUDENT).rglob("*")}
    assert not list(run_dir.glob(".student*"))


def test_formats_are_named_with_commas() -> None:
    assert formats_of(None) == ()
    assert formats_of("int8, hf") == ("hf", "int8")
    with pytest.raises(ExportError, match=r"--to: expected some of hf, bf16, .*, with commas between, got 'gguf'"):
        formats_of("onnx,gguf")


def test_what_is_no_run_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _guarded(["export", str(tmp_path)]) == 2
    said = capfd.readouterr().err
    assert said == f"error: expected the directory of a run with its config.json, found none at {tmp_path}\n"
    tiny.write_model(tmp_path / "model", "mlm")  # has a config.json, too
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / rundir.CONFIG).write_text('{"config": {')
    for name in ("model", "cut"):
        with pytest.raises(StorageError, match="expected the directory of a run"):
            pipeline.export_run(tmp_path / name, (), False, quiet)


def test_a_file_whose_logits_are_no_numbers_is_not_near(tmp_path: Path) -> None:
    row = TokenBatch(0, np.full((1, 4), 7, np.int32), np.array([4], np.int32), None, None, 1, np.zeros(1, np.int64))
    whole, broken = (tiny.model(tiny.FAMILIES["bert"], "classification") for _ in range(2))
    broken.classifier.bias.data[1] = torch.nan
    headed = [HeadedEncoder(model, "classification", "float32").frozen() for model in (whole, broken)]
    assert difference(headed[0], headed[0], [row] * 9) == 0
    assert np.isnan(difference(headed[1], headed[0], [row] * 9))


@pytest.mark.parametrize(
    ("validation", "test", "split"), [(0.2, 0.2, "validation"), (0.0, 0.2, "test"), (0.0, 0.0, None)]
)
def test_rows_to_check_on_are_those_that_nobody_learned_from(
    able_classifier: str, corpus_file: Path, tmp_path: Path, validation: float, test: float, split: str | None
) -> None:
    corpus = {"validation_share": validation, "test_share": test}
    config = config_for(tmp_path, able_classifier, corpus_file, finetune=None, evaluate=None, corpus=corpus)
    run = pipeline.prepare(config, quiet)
    if split is not None:
        assert exporting.held_out(run).split == split
    else:
        with pytest.raises(ExportError, match="expected validation rows to check what is exported on, got none"):
            exporting.held_out(run)


@pytest.mark.slow
def test_rows_are_real_ones_without_their_padding(exported: dict[str, Any], run_dir: Path) -> None:
    run = pipeline.prepare(exporting.run_config(run_dir), quiet)
    rows = real_rows(exporting.held_out(run), 7)
    assert len(rows) == 7 and all(row.input_ids_BL.shape == (1, row.lengths_B[0]) for row in rows)
    ids_BL, mask_BL, *_ = padded(rows)
    assert ids_BL.shape == mask_BL.shape == (7, max(row.lengths_B[0] for row in rows))
    assert mask_BL.sum() == sum(row.lengths_B[0] for row in rows)
    assert all((ids_BL[n][mask_BL[n]].numpy() == row.input_ids_BL[0]).all() for n, row in enumerate(rows))


@pytest.mark.slow
def test_only_what_is_asked_for_is_left(exported: dict[str, Any], run_dir: Path) -> None:
    pipeline.export_run(run_dir, ("int8",), True, quiet)
    assert [path.name for path in (run_dir / rundir.STUDENT / "onnx").iterdir()] == ["model_int8.onnx"]
    found = pipeline.export_run(run_dir, (), False, quiet)
    assert found["artefacts"] == [] and not (run_dir / rundir.STUDENT / "onnx").exists()


# ---- masked language models


@pytest.mark.slow
def test_a_masked_language_model_is_scored_at_its_masks(
    ray_cluster: None, tiny_teacher: str, corpus_file: Path, tmp_path: Path
) -> None:
    shape: dict[str, Any] = {**LANGUAGE_MODEL, "evaluate": None, "export": {"to": ["hf", "onnx"]}}
    config = config_for(tmp_path, tiny_teacher, corpus_file, distill={"epochs": 2}, **shape)
    report = pipeline.run_all(config, quiet)
    model, file = report["artefacts"]
    assert (model["format"], file["format"]) == ("hf", "onnx")
    assert file["score"]["metric"] == "masked accuracy" and file["score"] == model["score"]
    assert file["difference"] <= 1e-4


def test_packages_that_an_export_needs_are_missed_before_anything_is_trained(
    able_classifier: str, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = ("onnxruntime", "torchao")
    monkeypatch.setattr(preparing, "find_spec", lambda name: None if name in absent else object())
    for to, missed in ((["hf", "bf16"], ""), (["hf", "int8"], "onnxruntime"), (["int8-torchao"], "torchao")):
        config = config_for(tmp_path, able_classifier, corpus_file, finetune=None, export={"to": to})
        if missed:
            with pytest.raises(ConfigError, match=f"export.to: expected the package {missed} for {to[-1]}, found none"):
                pipeline.prepare(config, quiet)
        else:
            pipeline.prepare(config, quiet)


def test_a_run_is_exported_with_the_rows_it_was_made_from(
    finished: tuple[Config, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was installed since, of which `python-docs` is made; where the rows are gone, it is read again."""
    config, path = finished[0], tmp_path / "another"
    shutil.copytree(config.run_dir, path, ignore=shutil.ignore_patterns(rundir.LOCK))

    def changed(config: Config) -> Path:
        raise DataError("the corpus has changed")

    monkeypatch.setattr(preparing, "make_store", changed)
    assert pipeline.export_run(path, ("hf",), False, quiet)["artefacts"] == []
    monkeypatch.setenv("RAYDISTIL_CACHE", str(tmp_path / "empty"))
    with pytest.raises(DataError, match="the corpus has changed"):
        pipeline.export_run(path, ("hf",), False, quiet)


@pytest.mark.parametrize(("length", "expected"), [(8, ROWS), (400, TIMED_TOKENS // 400), (3000, 10)])
def test_long_texts_that_are_timed_are_fewer(monkeypatch: pytest.MonkeyPatch, length: int, expected: int) -> None:
    """But never fewer than warm up."""
    row = TokenBatch(0, np.zeros((1, length), np.int32), np.array([length], np.int32), None, None, 1, np.zeros(1, int))
    monkeypatch.setattr(measuring, "batches", lambda spec: iter([row] * 500))
    assert len(timed_rows(SimpleNamespace())) == expected  # type: ignore[arg-type]
