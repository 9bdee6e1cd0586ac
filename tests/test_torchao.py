"""Exported models in 8 bits by torchao. Where it is installed: transformers imports it with every start."""

from pathlib import Path

import pytest
import test_export_variants
import tiny
import torch
from test_pipeline import quiet

from raydistil import pipeline, rundir
from raydistil.errors import ExportError
from raydistil.export import FILES
from raydistil.export.measure import Artefact, load
from raydistil.export.smaller import has_fp8, to_torchao
from raydistil.heads import Inputs
from raydistil.models import LOADERS, transformer_layers
from raydistil.types import Task

pytest.importorskip("torchao")
run_dir = test_export_variants.run_dir


@pytest.mark.parametrize("task", ["classification", "mlm"])
def test_a_directory_in_8_bits_loads_with_transformers_alone(tmp_path: Path, task: Task) -> None:
    """The layers' matrices are whole numbers of 127 at most, a scale a row; what is tied or looked up is as in bf16."""
    path = tiny.write_model(tmp_path / "model", task)
    to_torchao(path, path / "int8-torchao", task, "int8-torchao")
    exact = LOADERS[task].from_pretrained(path).eval()
    small = LOADERS[task].from_pretrained(path, subfolder="int8-torchao", dtype="auto").eval()
    pairs = list(zip(transformer_layers(exact)[0].parameters(), transformer_layers(small)[0].parameters(), strict=True))
    matrices = [(whole, kept) for whole, kept in pairs if whole.ndim == 2]
    assert len(matrices) == 6
    for whole, kept in matrices:
        assert kept.qdata.dtype == torch.int8 and kept.scale.shape == (len(whole), 1)
        torch.testing.assert_close(kept.scale[:, 0].float() * 127, whole.abs().amax(1), rtol=2e-2, atol=0)
    assert all(torch.equal(kept, whole.bfloat16()) for whole, kept in pairs if whole.ndim == 1)
    assert torch.equal(small.get_input_embeddings().weight, exact.get_input_embeddings().weight.bfloat16())
    ids_BL, mask_BL = tiny.ids()
    loaded = load(Artefact("int8", "torchao", path / "int8-torchao"), task, (), 1)
    (said,) = loaded(Inputs(ids_BL, mask_BL), (loaded.num_layers,))[0].values()
    expected = exact.base_model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state[mask_BL.bool()]
    assert 0 < (said - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.skipif(has_fp8(), reason="has a GPU with products in float8")
def test_float8_without_such_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"fp8-torchao: expected a GPU with products in float8 .* found none"):
        to_torchao(tmp_path, tmp_path / "small", "classification", "fp8-torchao")


@pytest.mark.slow
def test_it_is_measured_beside_the_model(run_dir: Path) -> None:
    exported = pipeline.export_run(run_dir, ("int8-torchao",), True, quiet)
    made = {each["format"]: each for each in exported["artefacts"]}
    assert list(made) == ["hf", "int8-torchao"] and 0 < made["int8-torchao"]["difference"] < 1
    student = run_dir / rundir.STUDENT
    assert made["int8-torchao"]["bytes"] == (student / FILES["int8-torchao"]).stat().st_size < made["hf"]["bytes"]
    assert f"| {FILES['int8-torchao']} |" in (student / "README.md").read_text()
