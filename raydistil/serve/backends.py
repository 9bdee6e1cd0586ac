"""What a replica runs a batch of texts with: PyTorch or an ONNX file, all behind one call, and the choice among them.

torch    the checkpoint, rows of like length padded together
packed   the same weights with nothing padded: between embeddings and head the tokens of all rows are one sequence
onnx     onnx/model.onnx
int8     onnx/model_int8.onnx, of which the export has found out what it is worth

B rows of a group, L its padded length, T its real tokens, D hidden size, C classes, V vocabulary, H heads.
"""

import copy
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerBase

from raydistil import export
from raydistil.attention import PLAIN
from raydistil.errors import ModelError, RaydistilError
from raydistil.export import NEAR
from raydistil.export.onnx import OnnxModel
from raydistil.heads import Inputs
from raydistil.models import Headed, HeadedEncoder, load_model, load_tokenizer, transformer_layers
from raydistil.serve.schema import Wish
from raydistil.serve.source import REPORT
from raydistil.types import Task, models_language

# Weights in 8 bits are taken where they are asked for: what they say of a text hangs on its batch, and another replica
# may find another backend the fastest.
AUTO = ("torch", "packed", "onnx")
# Tokens of a group, padding included: MiniLM's best on a CPU. Larger ones leave its caches, smaller ones cost calls.
MOST_TOKENS = {"torch": 256, "packed": 1024, "onnx": 128, "int8": 128}
ROWS, LONGEST, ROUNDS = 12, 60, 5  # that backends are compared and timed on
FILES = {"onnx": export.FILES["onnx"], "int8": export.FILES["int8"]}
ADVICE = "run raydistil export RUN --to onnx,int8"
Result = NDArray[np.float32]
UNPADDED = "raydistil_unpadded"  # the attention of `packed`, as transformers knows it


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

    def __init__(self, name: str, model: Headed, task: Task) -> None:
        self.name = name
        self._model, self._task, self._most_tokens = model, task, MOST_TOKENS[name]

    @torch.inference_mode()
    def run(self, rows: list[Row]) -> list[Result | Best]:
        found: dict[int, Result | Best] = {}
        for group in groups([len(row.ids) for row in rows], self._most_tokens):
            said = self._said([rows[n] for n in group])
            found |= {n: kept(rows[n], each.numpy()) for n, each in zip(group, said, strict=True)}
        return [found[n] for n in range(len(rows))]

    def _said(self, rows: list[Row]) -> Iterator[Tensor]:
        """Views on what the model says of all of them."""
        lengths, inputs = [len(row.ids) for row in rows], together(rows)
        if models_language(self._task):
            return self._words(rows, lengths, inputs)
        said = self._model(inputs)[1]
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
        logits_NV = self._model.vocabulary_logits(states_TD[torch.cat(wanted)])
        return iter(torch.split(logits_NV, [len(each) for each in wanted]))


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


def together(rows: list[Row]) -> Inputs:
    lengths_B = torch.tensor([len(row.ids) for row in rows])
    ids_BL = np.zeros((len(rows), int(lengths_B.max())), np.int64)
    for line, row in zip(ids_BL, rows, strict=True):
        line[: len(row.ids)] = row.ids
    mask_BL = torch.arange(ids_BL.shape[1])[None] < lengths_B[:, None]
    return Inputs(torch.from_numpy(ids_BL), mask_BL, contexts_B=_contexts(rows))


def _contexts(rows: list[Row]) -> Tensor | None:
    """Of a single text among pairs the second one begins where it ends."""
    if all(row.context is None for row in rows):
        return None
    return torch.tensor([len(row.ids) if row.context is None else row.context for row in rows])


# ---- without padding


def unpadded(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same weights, stored once, whose layers see no padding. Embeddings and head, which cost little,
    are as they were. Raises ModelError for a family whose attention is more than queries, keys and values.
    """
    if model.config.model_type not in PLAIN:
        raise ModelError(f"packed: expected one of {', '.join(PLAIN)}, got {model.config.model_type}: torch pads it")
    shared = {id(part): part for part in itertools.chain(model.parameters(), model.buffers())}
    made = copy.deepcopy(model, shared)
    AttentionInterface.register(UNPADDED, _each_alone)
    AttentionMaskInterface.register(UNPADDED, _as_it_is)
    made.set_attn_implementation(UNPADDED)
    layers = transformer_layers(made)
    layers[0].register_forward_pre_hook(_pack)
    layers[-1].register_forward_hook(_unpack)
    return made


def _as_it_is(attention_mask: Tensor, **_: Any) -> Tensor:
    """[B, L], so that layers are told the rows' lengths."""
    return attention_mask


def _pack(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """To the first layer: states [B, L, D] as [1, T, D]."""
    states_BLD, mask_BL, *more = given
    return (states_BLD[mask_BL][None], mask_BL, *more)


def _unpack(_: Any, given: tuple[Any, ...], states_1TD: Tensor) -> Tensor:
    """From the last layer, the other way round."""
    mask_BL = given[1]
    states_BLD = states_1TD.new_zeros(*mask_BL.shape, states_1TD.shape[-1])
    states_BLD[mask_BL] = states_1TD[0]
    return states_BLD


def _each_alone(
    _: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None = None, **__: Any
) -> tuple[Tensor, None]:
    """[1, T, H, D / H] of queries, keys and values [1, H, T, D / H]: every row looks at itself."""
    lengths: list[int] = attention_mask.sum(-1).tolist()
    rows = zip(*(torch.split(part, lengths, 2) for part in (query, key, value)), strict=True)
    made = [F.scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in rows]
    return torch.cat(made, 2).transpose(1, 2), None


# ---- the choice


@dataclass(frozen=True, slots=True)
class Chosen:
    """The fastest, and how it came to be that."""

    backend: Backend
    rows_s: dict[str, float]  # texts a second of all that were measured
    left_out: dict[str, str]  # why the others were not


Choosing = Callable[[str, Task, tuple[str, ...], int, Wish], Chosen]


def choose(directory: str, task: Task, labels: tuple[str, ...], threads: int, wish: Wish) -> Chosen:
    """The fastest of what `directory` has and `wish` allows, on so many threads.

    Raises ModelError where it has not what is wished for, that says something else than the checkpoint, or this says
    no numbers.
    """
    torch.set_num_threads(threads)
    folder, model = Path(directory), load_model(directory, task, labels, "student")
    rows = made_rows(task, model, load_tokenizer(directory, "student"))
    expected = numbers_of(_made("torch", folder, model, task, threads), rows)
    if not all(np.isfinite(said).all() for said in expected):
        raise ModelError(f"expected a checkpoint that says numbers, the one in {directory} does not: train it again")
    found, left_out = dict[str, Backend](), dict[str, str]()
    for name in AUTO if wish == "auto" else (wish,):
        try:
            if name == "int8":
                _check_scored(folder)
            found[name] = _tried(partial(_made, name, folder, model, task, threads), name, rows, expected)
        except RaydistilError as error:
            if name == wish:
                raise
            left_out[name] = str(error)
    rows_s = _measured(found, rows)
    return Chosen(found[max(rows_s, key=rows_s.__getitem__)], rows_s, left_out)


def _made(name: str, folder: Path, model: PreTrainedModel, task: Task, threads: int) -> Grouped:
    """Raises RaydistilError where there is no such file, or nothing to run it with."""
    if name in FILES:
        _check_there(folder, name)
        return Grouped(name, OnnxModel(folder / FILES[name], threads, task), task)
    own = unpadded(model) if name == "packed" else model
    return Grouped(name, HeadedEncoder(own, task, "float32").frozen(), task)


def _check_there(folder: Path, name: str) -> None:
    if not (folder / FILES[name]).is_file():
        raise ModelError(f"{name}: expected {FILES[name]} in {folder}, found none: {ADVICE}")


def _check_scored(folder: Path) -> None:
    """Raise ModelError for weights in 8 bits that no export has scored."""
    _check_there(folder, "int8")
    path = folder / REPORT
    report = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
    small = {each["format"]: each for each in report.get("artefacts", ())}.get("int8")
    if small is None or small["bytes"] != (folder / FILES["int8"]).stat().st_size:
        raise ModelError(
            f"int8: expected a file that was scored when it was exported, {FILES['int8']} is none: {ADVICE}"
        )


def _tried(make: Callable[[], Backend], name: str, rows: list[Row], expected: list[Result]) -> Backend:
    """One that runs, and says what is expected; in 8 bits, what it loses is known. Raises ModelError for any other."""
    try:
        backend = make()
        off = difference(numbers_of(backend, rows), expected)
    except RaydistilError:
        raise
    except Exception as error:  # onnxruntime has a kind for every way in which a file can be wrong
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{name}: expected a file that runs, got: {reason}; {ADVICE}") from error
    rough = name == "int8"
    if not off <= (sys.float_info.max if rough else NEAR):  # nor nan
        wanted = "numbers of the checkpoint's shape" if rough else f"what the checkpoint says within {NEAR:g}"
        raise ModelError(f"{name}: expected {wanted}, got a difference of {off:.2g}: {ADVICE}")
    return backend


def difference(said: list[Result], expected: list[Result]) -> float:
    """The largest between any two numbers; infinite where shapes differ."""
    pairs = list(zip(said, expected, strict=True))
    if any(own.shape != other.shape for own, other in pairs):
        return math.inf
    return float(np.max([np.abs(own - other).max() for own, other in pairs]))


def made_rows(task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Texts of mixed length, of any words of the vocabulary."""
    draws = np.random.default_rng(0)
    longest = min(LONGEST, model.config.max_position_embeddings // 2)
    words = np.setdiff1d(np.arange(min(len(tokenizer), model.config.vocab_size)), tokenizer.all_special_ids)
    rows = []
    for length in draws.permutation(np.linspace(3, longest, ROWS).astype(int)).tolist():
        ids = draws.choice(words, length).astype(np.int32)
        for place, token in ((0, tokenizer.cls_token_id), (-1, tokenizer.sep_token_id)):
            ids[place] = ids[place] if token is None else token
        context = length // 2 if task == "question_answering" else None
        rows.append(Row(ids, context, np.array([length // 2]) if task == "mlm" else None))
    return rows


def _measured(backends: dict[str, Backend], rows: list[Row]) -> dict[str, float]:
    """Texts a second of each: the median of rounds, interleaved so that noise hits all alike."""
    taken_s: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(ROUNDS):
        for name, backend in backends.items():
            started = time.perf_counter()
            backend.run(rows)
            taken_s[name].append(time.perf_counter() - started)
    return {name: round(len(rows) / statistics.median(each), 1) for name, each in taken_s.items()}
