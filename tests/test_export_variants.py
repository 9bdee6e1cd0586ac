"""Exported models in fewer bits: what their files hold, what they say, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import decoders
import numpy as np
import onnx
import pytest
import test_clm_run
import tiny
import torch
from onnxruntime import InferenceSession
from safetensors.torch import load_file, save_file
from test_pipeline import quiet
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from raydistil import export as exporting
from raydistil import pipeline, rundir
from raydistil.cli import _guarded
from raydistil.config import Config
from raydistil.errors import ExportError
from raydistil.export import CALIBRATION, FILES
from raydistil.export.measure import Artefact, load, real_rows
from raydistil.export.onnx import to_onnx
from raydistil.export.smaller import to_bf16, to_fp16, to_int8, to_int8_static
from raydistil.heads import Inputs
from raydistil.tables import show_export
from raydistil.types import Format, Split, Task, TokenBatch

HALVES: tuple[Format, ...] = ("bf16", "fp16")


@pytest.fixture
def run_dir(finished: tuple[Config, dict[str, Any]], tmp_path: Path) -> Path:
    """A finished run of a classifier, to be spoilt."""
    config, _ = finished
    path = tmp_path / "another"
    shutil.copytree(config.run_dir, path, ignore=shutil.ignore_patterns(rundir.LOCK))
    return path


def said(path: Path, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {"input_ids": ids_BL.numpy(), "attention_mask": mask_BL.long().numpy()})
    return torch.from_numpy(made)


def row_of(ids_L: torch.Tensor) -> TokenBatch:
    ids_BL = ids_L[None].numpy().astype(np.int32)
    return TokenBatch(0, ids_BL, np.array([len(ids_L)], np.int32), None, None, 1, np.zeros(1, np.int64))


# ---- halves


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "mlm"])
def test_a_file_in_float16_takes_and_gives_what_that_in_float32_does(tmp_path: Path, task: Task) -> None:
    model = tiny.model(tiny.FAMILIES["bert"], task)
    to_onnx(model, task, tmp_path / "model.onnx")
    to_fp16(tmp_path / "model.onnx", tmp_path / "half.onnx")
    wide, half = (onnx.load(str(tmp_path / name)).graph for name in ("model.onnx", "half.onnx"))
    for before, after in ((wide.input, half.input), (wide.output, half.output)):
        assert [(value.name, value.type) for value in before] == [(value.name, value.type) for value in after]
    wider = [t.name for t in half.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1]
    assert wider == []  # but for norms' vectors
    ids_BL, mask_BL = tiny.ids()
    expected, made = (said(tmp_path / name, ids_BL, mask_BL) for name in ("model.onnx", "half.onnx"))
    assert made.dtype == torch.float32 and not torch.equal(made, expected)
    torch.testing.assert_close(made, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("task", "maker"),
    [("classification", AutoModelForSequenceClassification), ("mlm", AutoModelForMaskedLM)],
)
def test_a_variant_in_bfloat16_loads_with_transformers_alone(tmp_path: Path, task: Task, maker: Any) -> None:
    """Each weight is the rounded one, those that are tied too; without `variant` the model is as it was."""
    path = tiny.write_model(tmp_path / "model", task)
    to_bf16(path / FILES["hf"], path / FILES["bf16"])
    assert (path / FILES["bf16"]).stat().st_size < 0.6 * (path / FILES["hf"]).stat().st_size
    whole, rounded = (maker.from_pretrained(path, variant=variant).state_dict() for variant in (None, "bf16"))
    assert whole.keys() == rounded.keys()
    for name, weight in whole.items():
        assert torch.equal(rounded[name].float(), weight.bfloat16().float())
    assert any(not torch.equal(rounded[name].float(), weight) for name, weight in whole.items())
    labels = tiny.LABELS if task == "classification" else ()
    half = load(Artefact("bf16", "torch-bf16", path), task, labels, 1)
    ids_BL, mask_BL = tiny.ids()
    states, logits = half(Inputs(ids_BL, mask_BL), (half.num_layers,))
    assert all(tensor.dtype == torch.float32 for tensor in (*states.values(), logits) if tensor is not None)


@pytest.mark.slow
def test_halves_are_measured_and_need_not_be_faster(run_dir: Path) -> None:
    made = {each["format"]: each for each in pipeline.export_run(run_dir, HALVES, False, quiet)["artefacts"]}
    assert list(made) == ["hf", "bf16", "fp16"]
    student = run_dir / rundir.STUDENT
    assert [path.name for path in (student / "onnx").iterdir()] == ["model_fp16.onnx"]
    card = (student / "README.md").read_text()
    for name in HALVES:
        assert made[name]["difference"] > 0
        assert made[name]["bytes"] == (student / FILES[name]).stat().st_size
        assert made[name]["bytes"] < made["hf"]["bytes"] and f"| {FILES[name]} |" in card


@pytest.mark.slow
def test_a_causal_model_has_a_half_and_no_onnx(ray_cluster: None, corpus_file: Path, tmp_path: Path) -> None:
    teacher = str(decoders.write_model(tmp_path / "teacher", "gpt2"))
    config = test_clm_run.config_for(tmp_path, teacher, corpus_file, distill={"epochs": 1}, evaluate=None)
    pipeline.run_all(config, quiet)
    model, half = pipeline.export_run(config.run_dir, ("bf16",), True, quiet)["artefacts"]
    assert half["score"]["metric"] == "next-token accuracy" and half["score"]["rows"] == model["score"]["rows"]
    assert half["bytes"] < model["bytes"] and half["difference"] > 0
    with pytest.raises(ExportError, match="got a causal one: export it as bf16, fp8-torchao, hf, int8-torchao"):
        pipeline.export_run(config.run_dir, ("bf16", "fp16"), True, quiet)


@pytest.mark.slow
def test_what_is_no_number_in_float16_is_refused(run_dir: Path) -> None:
    """States of a million, which float32 holds and the next norm makes small again; `force` takes no such file."""
    weights = load_file(run_dir / rundir.DISTILLED / "model.safetensors")
    (norm,) = [name for name in weights if name.endswith("embeddings.LayerNorm.weight")]
    weights[norm] *= 1e6
    save_file(weights, run_dir / rundir.DISTILLED / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"fp16: expected logits that are numbers, got nan for some: leave fp16"):
        pipeline.export_run(run_dir, ("fp16",), True, quiet)


# ---- 8 bits with ranges that are known before


@pytest.mark.slow
def test_what_a_text_is_given_in_static_ranges_hangs_on_no_other(tmp_path: Path) -> None:
    """Unlike in those that are found on the way; embeddings and matrices are in 8 bits all the same."""
    to_onnx(tiny.model(tiny.FAMILIES["bert"], "classification"), "classification", tmp_path / "model.onnx")
    ids_BL, _ = tiny.ids(16)
    to_int8(tmp_path / "model.onnx", tmp_path / "dynamic.onnx")
    to_int8_static(tmp_path / "model.onnx", tmp_path / "static.onnx", [row_of(ids_L) for ids_L in ids_BL])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dynamic.onnx", "model.onnx", "static.onnx"]
    proto = onnx.load(str(tmp_path / "static.onnx"))
    floats = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1]
    assert [tensor.name for tensor in floats if min(tensor.dims) > 1] == []

    def beside_others(name: str) -> float:
        alone, together = (said(tmp_path / name, ids, torch.ones_like(ids).bool()) for ids in (ids_BL[:1], ids_BL))
        return (alone - together[:1]).abs().max().item()

    assert beside_others("static.onnx") < 1e-5 < beside_others("dynamic.onnx")
    whole = torch.ones_like(ids_BL).bool()
    expected, made = (said(tmp_path / name, ids_BL, whole) for name in ("model.onnx", "static.onnx"))
    assert (made - expected).abs().max() < 0.2 * expected.abs().max()


def test_no_rows_to_find_ranges_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="int8-static: expected labelled training rows to find ranges on, got none"):
        to_int8_static(tmp_path / "model.onnx", tmp_path / "static.onnx", [])


@pytest.mark.slow
def test_ranges_are_found_on_training_rows_alone(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[TokenBatch] = []

    def stop(source: Path, path: Path, rows: list[TokenBatch]) -> None:
        found.extend(rows)
        raise ExportError("far enough")

    monkeypatch.setattr(exporting, "to_int8_static", stop)
    with pytest.raises(ExportError, match="far enough"):
        pipeline.export_run(run_dir, ("int8-static",), True, quiet)
    spec = exporting.held_out(pipeline.prepare(exporting.run_config(run_dir), quiet))

    def texts(split: Split) -> set[bytes]:
        return {row.input_ids_BL.tobytes() for row in real_rows(replace(spec, split=split), 10**6)}

    assert 0 < len(found) <= CALIBRATION
    kept = {row.input_ids_BL.tobytes() for row in found}
    assert kept <= texts("train") and not kept <= texts(spec.split)


# ---- tied matrices


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "electra"])
def test_a_tied_decoder_is_in_the_file_once(tmp_path: Path, family: str) -> None:
    """Of a vocabulary that is most of the model."""
    config = tiny.FAMILIES[family].from_dict({**tiny.FAMILIES[family].to_dict(), "vocab_size": 20_000})
    model = tiny.model(config, "mlm")
    to_onnx(model, "mlm", tmp_path / "model.onnx")
    parameters = sum(parameter.numel() for parameter in model.parameters())  # tied ones count once
    held = sum(int(np.prod(tensor.dims)) for tensor in onnx.load(str(tmp_path / "model.onnx")).graph.initializer)
    assert parameters <= held < parameters + 0.1 * model.get_input_embeddings().weight.numel()
    ids_BL, mask_BL = tiny.ids()
    with torch.inference_mode():
        expected = model(input_ids=ids_BL, attention_mask=mask_BL).logits
    made = said(tmp_path / "model.onnx", ids_BL, mask_BL)
    torch.testing.assert_close(made[mask_BL], expected[mask_BL], atol=1e-4, rtol=1e-4)


# ---- another task's checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("formats", ["hf", "int8"])
def test_a_checkpoint_of_another_task_is_named(run_dir: Path, formats: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = run_dir / rundir.DISTILLED
    for task, kept in (
        ("mlm", "a BertForSequenceClassification for the run's classification, got BertForMaskedLM"),
        ("regression", "a head of 3 for the run's classification, got one of 1"),
    ):
        shutil.rmtree(path)
        tiny.write_model(path, task)
        shape = json.loads((path / "config.json").read_text())
        if task == "regression":
            shape |= {"id2label": {"0": "only"}, "label2id": {"only": 0}}
            (path / "config.json").write_text(json.dumps(shape))
        capfd.readouterr()
        assert _guarded(["export", str(run_dir), "--to", formats]) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert line == f"error: {path}: expected {kept}: run distill again"


# ---- the table


def test_all_files_fit_a_terminal_of_eighty_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    score = {"metric": "masked accuracy", "value": 0.8096, "rows": 241_600}
    made = [
        {"format": name, "bytes": size * 2**18, "difference": None if name == "hf" else 4.9e-2, "split": "validation",
         "score": score, "latency_p50_ms": 107.1, "latency_p99_ms": 113.1, "rows_s": 1255.6 * 4 / size,
         "peak_mib": 1145.0}
        for name, size in zip(FILES, (1064, 532, 1064, 532, 266, 266, 333, 333), strict=True)
    ]  # fmt: skip
    show_export({"artefacts": made, "student_dir": "somewhere"})
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if len(line.split()) > 8 and line.split()[0] in FILES]
    assert [row[0] for row in rows] == list(FILES) and max(map(len, lines)) <= 80
    assert all(len(row) == len(rows[1]) for row in rows[1:]) and "…" not in "".join(lines)
    assert (rows[1][2], rows[-1][2]) == ("0.50", "0.31")  # bytes, of the model in PyTorch
    assert (rows[1][7], rows[-1][7]) == ("2.00", "3.20")  # texts a second
