"""What a replica runs a batch of texts with: PyTorch or an ONNX file, all behind one call. `choice` chooses.

torch    the checkpoint, rows of like length padded together
packed   the same weights with nothing padded, see `unpadded`
bf16     the same with the layers' products in bfloat16; the export has scored the student with all of it in bfloat16
onnx     onnx/model.onnx
int8     onnx/model_int8.onnx, which the export has scored
mixed    onnx for a text that comes alone, packed for more at once

B rows of a group, L its padded length, T its real tokens, D hidden size, C classes, V vocabulary.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from raydistil import export
from raydistil.attention import PLAIN
from raydistil.errors import ModelError
from raydistil.export.onnx import OnnxModel
from raydistil.heads import Inputs
from raydistil.models import Headed, HeadedEncoder
from raydistil.serve.served import Hardware
from raydistil.serve.unpadded import lays_out, shared, unpadded
from raydistil.types import Task, models_language

# Tokens of a group, padding included: MiniLM's best on a CPU. Larger ones leave its caches, smaller ones cost calls.
MOST_TOKENS = {"torch": 256, "packed": 1024, "bf16": 1024, "onnx": 128, "int8": 128}
GPU_TOKENS = 16_384  # of a group there
ONNX = ("onnx", "int8")  # those of onnxruntime
FILES: dict[str, Path] = {"bf16": export.FILES["bf16"], "onnx": export.FILES["onnx"], "int8": export.FILES["int8"]}
ADVICE = "run raydistil export RUN --to onnx,int8,bf16"
Result = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Row:
    """One text."""

    ids: NDArray[np.int32]  # its tokens, special ones included
    context: int | None = None  # of two texts: the first token of the second one
    places: NDArray[np.int64] | None = None  # masked LM: the tokens whose logits over the vocabulary are wanted
    best: int | None = None  # or of these no more than so many, see `Best`


@dataclass(frozen=True, slots=True)
class Best:
    """Of each mask of a text, the K most probable tokens."""

    scores_MK: NDArray[np.float32]
    ids_MK: NDArray[np.int64]


class Backend(Protocol):
    """Results are float32 and own their memory: of a row of L tokens

    | task                                  | shape             |
    |---------------------------------------|-------------------|
    | classification, regression, embedding | [C], or [1], [D]  |
    | token_classification                  | [L, C]            |
    | question_answering                    | [2, L]            |
    | mlm                                   | [len(places), V], or Best |
    """

    @property
    def name(self) -> str: ...

    def run(self, rows: list[Row]) -> list[Result | Best]: ...


def numbers_of(backend: Backend, rows: list[Row]) -> list[Result]:
    """Of rows that ask for all there are."""
    assert all(row.best is None for row in rows)
    made: Any = backend.run(rows)
    return list(made)


class Grouped:
    """A model that is given rows of like length together, and so pads little whatever the batch."""

    def __init__(self, name: str, model: Headed, task: Task, on_gpu: bool = False) -> None:
        self.name = name
        self._model, self._task = model, task
        self._device, self._most_tokens = ("cuda", GPU_TOKENS) if on_gpu else ("cpu", MOST_TOKENS[name])

    @torch.inference_mode()
    def run(self, rows: list[Row]) -> list[Result | Best]:
        found: dict[int, Result | Best] = {}
        for group in groups([len(row.ids) for row in rows], self._most_tokens):
            said = self._said([rows[n] for n in group])
            found |= {n: kept(rows[n], each.numpy()) for n, each in zip(group, said, strict=True)}
        return [found[n] for n in range(len(rows))]

    def _said(self, rows: list[Row]) -> Iterator[Tensor]:
        """Views on what the model says of all of them."""
        lengths, inputs = [len(row.ids) for row in rows], together(rows, self._device)
        if models_language(self._task):
            return self._words(rows, lengths, inputs)
        found = self._model(inputs)[1]
        assert found is not None, "only a language model says nothing by itself"
        said = found.cpu()
        if self._task == "token_classification":
            return iter(torch.split(said, lengths))
        if self._task == "question_answering":
            return (both_2L[:, :length] for both_2L, length in zip(said.unflatten(0, (-1, 2)), lengths, strict=True))
        return iter(said)

    def _words(self, rows: list[Row], lengths: list[int], inputs: Inputs) -> Iterator[Tensor]:
        last = self._model.num_layers
        states_TD = self._model(inputs, (last,))[0][last]
        starts = itertools.accumulate(lengths, initial=0)
        wanted = [torch.from_numpy(places_of(row)) + start for row, start in zip(rows, starts, strict=False)]
        logits_NV = self._model.vocabulary_logits(states_TD[torch.cat(wanted)]).cpu()
        return iter(torch.split(logits_NV, [len(each) for each in wanted]))


class Mixed:
    """Two of them, in memory both."""

    name = "mixed"

    def __init__(self, alone: Backend, many: Backend) -> None:
        self._alone, self._many = alone, many

    def run(self, rows: list[Row]) -> list[Result | Best]:
        return (self._alone if len(rows) == 1 else self._many).run(rows)


def kept(row: Row, said: Result) -> Result | Best:
    """Of what a model has said all together, what a row asks for."""
    return said.copy() if row.best is None else best_of(said, row.best)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Over the last axis."""
    powers: NDArray[np.float32] = np.exp(logits - logits.max(-1, keepdims=True))
    shares: NDArray[np.float32] = powers / powers.sum(-1, keepdims=True)
    return shares


def best_of(logits_MV: Result, count: int) -> Best:
    scores_MV = softmax(logits_MV)
    kept = min(count, scores_MV.shape[-1])
    some_MK = np.argpartition(-scores_MV, kept - 1, axis=-1)[:, :kept]
    order_MK = np.argsort(-np.take_along_axis(scores_MV, some_MK, -1), axis=-1, kind="stable")
    ids_MK = np.take_along_axis(some_MK, order_MK, -1)
    return Best(np.take_along_axis(scores_MV, ids_MK, -1), ids_MK)


def places_of(row: Row) -> NDArray[np.int64]:
    assert row.places is not None, "rows of a language model say which tokens are wanted"
    return row.places


def groups(lengths: list[int], most_tokens: int) -> Iterator[list[int]]:
    """The rows, longest first; no group has more tokens than that with its padding, unless it is one row."""
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    while order:
        count = max(1, most_tokens // lengths[order[0]])
        yield order[:count]
        order = order[count:]


def together(rows: list[Row], device: str) -> Inputs:
    lengths_B = torch.tensor([len(row.ids) for row in rows])
    ids_BL = np.zeros((len(rows), int(lengths_B.max())), np.int64)
    for line, row in zip(ids_BL, rows, strict=True):
        line[: len(row.ids)] = row.ids
    mask_BL = torch.arange(ids_BL.shape[1])[None] < lengths_B[:, None]
    contexts_B = _contexts(rows)
    own_B = None if contexts_B is None else contexts_B.to(device)
    return Inputs(torch.from_numpy(ids_BL).to(device), mask_BL.to(device), contexts_B=own_B)


def _contexts(rows: list[Row]) -> Tensor | None:
    """Of a single text among pairs the second one begins where it ends."""
    if all(row.context is None for row in rows):
        return None
    return torch.tensor([len(row.ids) if row.context is None else row.context for row in rows])


# ---- all there are


def backend(name: str, folder: Path, model: PreTrainedModel, task: Task, hardware: Hardware) -> Grouped:
    """The one of this name, of a model that is where it is to run.

    Raises RaydistilError where there is no such file, or nothing to run it with.
    """
    if name in ONNX:
        if hardware.on_gpu:
            raise ModelError(f"{name}: expected a replica on CPUs, onnxruntime's is for these: leave --gpus out")
        check_there(folder, name)
        return Grouped(name, OnnxModel(folder / FILES[name], hardware.threads, task), task)
    return Grouped(name, encoder(name, model, task), task, hardware.on_gpu)


def encoder(name: str, model: PreTrainedModel, task: Task) -> HeadedEncoder:
    """Of PyTorch's backends, with the model's own tensors as far as it can."""
    if name == "bf16" and not (lays_out(model, torch.bfloat16) and model.config.model_type in PLAIN):
        return HeadedEncoder(shared(model), task, "bfloat16").frozen()
    kinds = {"packed": torch.float32, "bf16": torch.bfloat16}
    own = unpadded(model, kinds[name]) if name in kinds else model
    return HeadedEncoder(own, task, "float32").frozen()


def check_there(folder: Path, name: str) -> None:
    """Raise ModelError where the export has left no such file."""
    if not (folder / FILES[name]).is_file():
        raise ModelError(f"{name}: expected {FILES[name]} in {folder}, found none: {ADVICE}")
