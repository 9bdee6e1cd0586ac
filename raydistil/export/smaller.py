"""An exported model in fewer bits: PyTorch's weights in bfloat16 or 8 bits, ONNX files in float16 or 8 bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from raydistil.errors import ExportError
from raydistil.export.measure import padded
from raydistil.export.onnx import feed, needed, quiet
from raydistil.models import LOADERS, quiet_transformers
from raydistil.types import Format, Task, TokenBatch

INT8_OPS = ("MatMul", "Gemm", "Gather")  # with Gather the embeddings, most of a small student
# What sums or divides over many numbers, as one operation or in pieces: float16 ends at 65,504.
FLOAT32_OPS = ("LayerNormalization", "Softmax", "ReduceMean", "ReduceSum", "Pow", "Sqrt", "Reciprocal")


def to_bf16(source: Path, path: Path) -> None:
    """The weights of a safetensors file, rounded: what transformers loads with `variant="bf16"`."""
    halves = {name: _half(weight) for name, weight in load_file(str(source)).items()}
    save_file(halves, str(path), metadata={"format": "pt"})


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


def to_torchao(source: Path, folder: Path, task: Task, name: Format) -> None:
    """A directory that transformers loads where torchao is installed: the layers' matrices in 8 bits, a scale a row,
    activations rounded to as many on the way; the rest in bfloat16.

    Raises ExportError for `fp8-torchao` where no GPU has such products: torchao makes it nowhere else.
    """
    needed("torchao", "torchao")
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int8DynamicActivationInt8WeightConfig
    from torchao.quantization.granularity import PerRow
    from transformers import TorchAoConfig  # imports torchao, which prints of what it lacks

    if name == "fp8-torchao" and not has_fp8():
        raise ExportError(
            f"{name}: expected a GPU with products in float8 (compute capability 8.9 or more), found none: leave it out"
        )
    fp8 = name == "fp8-torchao"
    kind = (
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
        if fp8
        else Int8DynamicActivationInt8WeightConfig()
    )
    quiet_transformers()
    with torch.device("cuda" if fp8 else "cpu"):
        made = LOADERS[task].from_pretrained(source, quantization_config=TorchAoConfig(kind), dtype=torch.bfloat16)
    made.save_pretrained(folder)


def has_fp8() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


def to_fp16(source: Path, path: Path) -> None:
    """An ONNX file with weights and products in float16; inputs, outputs, norms and softmaxes stay as they are."""
    onnx = needed("onnx")
    needed("onnxruntime")
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel as Graph

    kept = [*DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPS]
    graph = Graph(convert_float_to_float16(onnx.load(str(source)), keep_io_types=True, op_block_list=kept))
    graph.topological_sort()  # the converter puts its casts last
    del graph.model.graph.value_info[:]  # and names wrong types for what it leaves in float32
    onnx.save(graph.model, str(path))
    onnx.checker.check_model(str(path), full_check=True)


def to_int8(source: Path, path: Path) -> None:
    """Quantize the weights of an ONNX file: a scale for each row or column, activations by what they are at the time.

    Dynamic quantization (Jacob et al. 2018, arXiv:1712.05877, of weights and, on the way, activations).
    """
    needed("onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _inferred(source, path) as inferred:
        quantize_dynamic(
            str(inferred), str(path), op_types_to_quantize=list(INT8_OPS), per_channel=True,
            reduce_range=not has_vnni(), weight_type=QuantType.QInt8,
        )  # fmt: skip


def to_int8_static(source: Path, path: Path, rows: list[TokenBatch]) -> None:
    """Quantize an ONNX file with the ranges that activations have on `rows`: what a text is given hangs on no other.

    On the quickstart's student (0.8096, 287 texts a second in float32; one thread of a CPU with VNNI): Q and DQ around
    products in float32, 601 texts a second and 0.8092; products in 8 bits too, 541 and 0.8038; QOperator, 564 and
    0.8084. Logits are off by 0.055 in the mean with the ranges as they are (MinMax) and with Entropy's, by 0.057 with
    99.999 % of the values, by 0.24 with 99.99 %. Activations with a sign and no zero point: 250 texts a second.
    """
    onnx = needed("onnx")
    needed("onnxruntime")
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    if not rows:
        raise ExportError("int8-static: expected labelled training rows to find ranges on, got none: export it as int8")
    names = {given.name for given in onnx.load(str(source), load_external_data=False).graph.input}
    with _inferred(source, path) as inferred:
        quantize_static(
            str(inferred), str(path), _Feeds(rows, names), quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(INT8_OPS), per_channel=True, reduce_range=not has_vnni(),
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod.MinMax,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )  # fmt: skip


class _Feeds:
    """Texts, one at a time and without padding, as onnxruntime's calibration reads them."""

    def __init__(self, rows: list[TokenBatch], names: set[str]) -> None:
        self._rows, self._names = iter(rows), names

    def get_next(self) -> dict[str, NDArray[np.int64]] | None:
        row = next(self._rows, None)
        return None if row is None else feed(padded([row]), self._names)


@contextmanager
def _inferred(source: Path, path: Path) -> Iterator[Path]:
    """`source` with shapes and with constants made, as quantizers want it; gone, as what they print, in the end."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    inferred = path.with_suffix(".inferred")
    with quiet():
        quant_pre_process(str(source), str(inferred), skip_symbolic_shape=True)
        yield inferred
    inferred.unlink()


def has_vnni() -> bool:
    """Whether this CPU adds products of 8 bits into 32; those that do not overflow at 16 unless weights have 7."""
    cpu = Path("/proc/cpuinfo")
    return "vnni" in cpu.read_text() if cpu.exists() else False
