"""ONNX: a model as one file that onnxruntime runs, in 32 bits or with weights in 8.

Batch and length are free. The file stands where onnxruntime's and transformers.js's users look for it: onnx/model.onnx
beside config.json.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from raydistil.errors import ExportError

OPSET = 18  # what onnxruntime-web knows whole
INPUTS = ("input_ids", "attention_mask")  # int64 [B, L]
OUTPUT = "logits"  # float32 [B, C], or [B, L, V] of a language model
INT8_OPS = ("MatMul", "Gemm", "Gather")  # with Gather the embeddings, most of a small student


class _Headed(nn.Module):
    """(ids, mask) -> logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def to_onnx(model: PreTrainedModel, path: Path) -> None:
    """Write `model` to `path`, checked. Raises ExportError for one with an operation that ONNX does not have."""
    onnx = needed("onnx")
    needed("onnxscript")
    model = model.eval()
    model.set_attn_implementation("eager")
    ids = torch.ones(2, 8, dtype=torch.int64)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with _quiet():
            program = torch.onnx.export(
                _Headed(model), (ids, torch.ones_like(ids)), dynamo=True, dynamic_shapes=(free, free),
                input_names=list(INPUTS), output_names=[OUTPUT], opset_version=OPSET, verbose=False,
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(
            f"expected a model that ONNX can say, {type(model).__name__} is none ({reason}): export it as hf"
        ) from error
    assert program is not None
    program.save(str(path), external_data=False)
    onnx.checker.check_model(str(path), full_check=True)


def to_int8(source: Path, path: Path) -> None:
    """Quantize the weights of an ONNX file: a scale for each row or column, activations by what they are at the time.

    Dynamic quantization (Jacob et al. 2018, arXiv:1712.05877, of weights and, on the way, activations).
    """
    needed("onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    inferred = path.with_suffix(".inferred")
    with _quiet():
        quant_pre_process(str(source), str(inferred), skip_symbolic_shape=True)
        quantize_dynamic(
            str(inferred), str(path), op_types_to_quantize=list(INT8_OPS), per_channel=True,
            reduce_range=not has_vnni(), weight_type=QuantType.QInt8,
        )  # fmt: skip
    inferred.unlink()


def has_vnni() -> bool:
    """Whether this CPU adds products of 8 bits into 32; those that do not overflow at 16 unless weights have 7."""
    cpu = Path("/proc/cpuinfo")
    return "vnni" in cpu.read_text() if cpu.exists() else False


class OnnxModel:
    """One file in onnxruntime, called as a `HeadedEncoder` is: its last state are the logits themselves."""

    num_layers = 0

    def __init__(self, path: Path, threads: int, whole: bool) -> None:
        """`whole`: a text has one output, not each of its tokens."""
        ort: Any = needed("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._whole = whole

    def logits(self, ids_BL: NDArray[np.int64], mask_BL: NDArray[np.int64]) -> NDArray[np.float32]:
        (made,) = self._session.run([OUTPUT], dict(zip(INPUTS, (ids_BL, mask_BL), strict=True)))
        found: NDArray[np.float32] = made
        return found

    def __call__(
        self, input_ids_BL: Tensor, mask_BL: Tensor, states: tuple[int, ...] = (), positions_BL: Tensor | None = None
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        assert positions_BL is None
        made = torch.from_numpy(self.logits(input_ids_BL.numpy(), mask_BL.long().numpy()))
        return ({}, made) if self._whole else ({0: made[mask_BL]}, None)

    def vocabulary_logits(self, states_ND: Tensor) -> Tensor:
        return states_ND


def needed(package: str) -> Any:
    """The module, imported when it is asked for. Raises ExportError where it is not installed."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(
            f"expected the package {package} for ONNX, found none: pip install 'raydistil[onnx]'"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters and quantizers print of their progress."""
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
