"""ONNX: a model as one file that onnxruntime runs; see smaller.py for fewer bits.

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
from raydistil.heads import Inputs, has_types, span_logits, vectors
from raydistil.types import Task, models_language

OPSET = 18  # what onnxruntime-web knows whole
INPUTS = ("input_ids", "attention_mask")  # int64 [B, L]
TYPES = "token_type_ids"  # of two texts, where the model has a use for them
OUTPUTS: dict[Task, tuple[str, ...]] = {  # float32; the others: logits [B, C], or [B, L, C] of tokens
    "question_answering": ("start_logits", "end_logits"),  # [B, L]
    "embedding": ("token_embeddings", "sentence_embedding"),  # [B, L, D], [B, D] of length 1
}


def outputs_of(task: Task) -> tuple[str, ...]:
    return OUTPUTS.get(task, ("logits",))


class _Headed(nn.Module):
    """The inputs, in the order of their names -> the outputs."""

    def __init__(self, model: PreTrainedModel, task: Task, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self._task, self._names = model, task, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        out = self.model(**dict(zip(self._names, inputs, strict=True)))
        if self._task == "embedding":
            states_BLD = out.last_hidden_state
            return states_BLD, vectors(states_BLD, inputs[1].bool(), self.model.config.pooling)
        return tuple(getattr(out, name) for name in outputs_of(self._task))


def to_onnx(model: PreTrainedModel, task: Task, path: Path, pairs: bool = False) -> None:
    """Write `model` to `path`, checked; `pairs`: it was trained on pairs of texts.

    Raises ExportError for one with an operation that ONNX does not have.
    """
    onnx = needed("onnx")
    needed("onnxscript")
    model = model.eval()
    model.set_attn_implementation("eager")
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    names = (*INPUTS, TYPES) if (pairs or task == "question_answering") and has_types(model) else INPUTS
    shown = tuple(torch.ones(2, 8, dtype=torch.int64) for _ in names)  # the same one twice would be one input
    try:
        with quiet():
            program = torch.onnx.export(
                _Headed(model, task, names), shown, dynamo=True, dynamic_shapes=((free,) * len(names),),
                input_names=list(names), output_names=list(outputs_of(task)), opset_version=OPSET, verbose=False,
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(
            f"expected a model that ONNX can say, {type(model).__name__} is none ({reason}): export it as hf"
        ) from error
    assert program is not None
    proto = program.model_proto
    _share_tied(proto.graph)
    onnx.save(proto, str(path))
    onnx.checker.check_model(str(path), full_check=True)


def _share_tied(graph: Any) -> None:
    """A decoder tied to the embeddings is the transposition of them that runtimes make on loading, not a copy."""
    from onnx import helper

    kept = {tensor.name: tensor for tensor in graph.initializer}
    looked_up = [kept[node.input[0]] for node in graph.node if node.op_type == "Gather" and node.input[0] in kept]
    for copy in [tensor for tensor in graph.initializer if len(tensor.dims) == 2]:
        for table in looked_up:
            if _transposed(copy, table):
                graph.initializer.remove(copy)
                graph.node.insert(0, helper.make_node("Transpose", [table.name], [copy.name], perm=[1, 0]))
                break


def _transposed(left: Any, right: Any) -> bool:
    from onnx.numpy_helper import to_array

    if left.name == right.name or list(left.dims) != list(right.dims)[::-1]:
        return False
    return np.array_equal(to_array(left), to_array(right).T)


def feed(inputs: Inputs, names: set[str]) -> dict[str, NDArray[np.int64]]:
    """What a file with inputs of these names is given."""
    given = {INPUTS[0]: inputs.ids_BL, INPUTS[1]: inputs.mask_BL.long()}
    given |= {TYPES: inputs.types_BL()} if TYPES in names else {}
    return {name: part.numpy() for name, part in given.items()}


class OnnxModel:
    """One file in onnxruntime, called as a `HeadedEncoder` is: a language model's last state are the logits."""

    num_layers = 0

    def __init__(self, path: Path, threads: int, task: Task) -> None:
        ort: Any = needed("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._task = task
        self._outputs = [name for name in outputs_of(task) if name != "token_embeddings"]
        self._names = {given.name for given in self._session.get_inputs()}

    def outputs(self, inputs: Inputs) -> list[Tensor]:
        """[B, L] start and end, or vectors [B, D], or logits."""
        made = self._session.run(self._outputs, feed(inputs, self._names))
        return [torch.from_numpy(part) for part in made]

    def __call__(self, inputs: Inputs, states: tuple[int, ...] = ()) -> tuple[dict[int, Tensor], Tensor | None]:
        made = self.outputs(inputs)
        if models_language(self._task):
            return {0: made[0][inputs.mask_BL]}, None
        if self._task == "question_answering":
            return {}, span_logits(made[0], made[1], inputs)
        return {}, made[0][inputs.mask_BL] if self._task == "token_classification" else made[0]

    def vocabulary_logits(self, states_ND: Tensor) -> Tensor:
        return states_ND


def needed(package: str, extra: str = "onnx") -> Any:
    """The module, imported when it is asked for. Raises ExportError where it is not installed."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(f"expected the package {package}, found none: pip install 'raydistil[{extra}]'") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
