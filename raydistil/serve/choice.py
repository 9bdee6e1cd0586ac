"""Which backend a replica runs: the fastest, on this machine, of those that say what the checkpoint says."""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raydistil.errors import ModelError, RaydistilError
from raydistil.export import NEAR
from raydistil.models import load_model, load_tokenizer
from raydistil.serve.backends import (
    ADVICE,
    FILES,
    Backend,
    Mixed,
    Result,
    Row,
    backend,
    check_there,
    numbers_of,
)
from raydistil.serve.schema import Wish
from raydistil.serve.served import Hardware
from raydistil.serve.source import REPORT
from raydistil.types import Task

AUTO = ("torch", "packed", "onnx")
MIXED, WORTH = ("packed", "onnx"), 1.15  # times the texts a second, where they come alone, is worth the memory
# Taken where they are asked for: the student was scored in float32. What 8 bits say of a text hangs on its batch, too.
ROUGH = ("bf16", "int8")
ROWS, LONGEST, ROUNDS = 12, 60, 5  # that backends are compared and timed on


@dataclass(frozen=True, slots=True)
class Chosen:
    """The fastest, and how it came to be that."""

    backend: Backend
    rows_s: dict[str, float]  # texts a second of all that were measured
    left_out: dict[str, str]  # why the others were not


Choosing = Callable[[str, Task, tuple[str, ...], Hardware, Wish], Chosen]


def choose(directory: str, task: Task, labels: tuple[str, ...], hardware: Hardware, wish: Wish) -> Chosen:
    """The fastest of what `directory` has and `wish` allows, on this hardware.

    Raises ModelError where it has not what is wished for, that says something else than the checkpoint, or this says
    no numbers; and where there is no such hardware.
    """
    torch.set_num_threads(hardware.threads)
    folder, model = Path(directory), _placed(load_model(directory, task, labels, "student"), hardware)
    rows = made_rows(task, model, load_tokenizer(directory, "student"))
    expected = numbers_of(backend("torch", folder, model, task, hardware), rows)
    if not all(np.isfinite(said).all() for said in expected):
        raise ModelError(f"expected a checkpoint that says numbers, the one in {directory} does not: train it again")

    def tried(name: str) -> Backend:
        if name in ROUGH:
            _check_scored(folder, name)
        return _tried(partial(backend, name, folder, model, task, hardware), name, rows, expected)

    if wish != "auto":
        return _wished({name: tried(name) for name in (MIXED if wish == "mixed" else (wish,))}, rows)
    found, left_out = dict[str, Backend](), dict[str, str]()
    for name in AUTO:
        try:
            found[name] = tried(name)
        except RaydistilError as error:
            left_out[name] = str(error)
    return _fastest(found, left_out, rows)


def _wished(found: dict[str, Backend], rows: list[Row]) -> Chosen:
    """The one there is, or both that are mixed."""
    one = Mixed(found["onnx"], found["packed"]) if len(found) > 1 else next(iter(found.values()))
    return Chosen(one, _measured(found, rows), {})


def _fastest(found: dict[str, Backend], left_out: dict[str, str], rows: list[Row]) -> Chosen:
    rows_s = _measured(found, rows)
    best = max(rows_s, key=rows_s.__getitem__)
    if best == "packed" and _is_worth_mixing(found, rows):
        return Chosen(Mixed(found["onnx"], found["packed"]), rows_s, left_out)
    return Chosen(found[best], rows_s, left_out)


def _is_worth_mixing(found: dict[str, Backend], rows: list[Row]) -> bool:
    """Whether a text alone takes much less in the ONNX file: its runtime has less to do around the products."""
    if not found.keys() >= set(MIXED):
        return False
    middle = sorted(rows, key=lambda row: len(row.ids))[len(rows) // 2]
    alone_s = _measured({name: found[name] for name in MIXED}, [middle])
    return alone_s["onnx"] > WORTH * alone_s["packed"]


def _placed(model: PreTrainedModel, hardware: Hardware) -> PreTrainedModel:
    """Where it is to run. Raises ModelError where PyTorch sees no GPU."""
    if not hardware.on_gpu:
        return model
    if not torch.cuda.is_available():
        raise ModelError("expected a GPU that PyTorch sees, found none: install PyTorch with CUDA, or leave --gpus out")
    moved: Any = model
    placed: PreTrainedModel = moved.to("cuda")
    return placed


def _check_scored(folder: Path, name: str) -> None:
    """Raise ModelError for weights of fewer bits that no export has scored."""
    check_there(folder, name)
    path, file = folder / REPORT, FILES[name]
    report = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
    small = {each["format"]: each for each in report.get("artefacts", ())}.get(name)
    if small is None or small["bytes"] != (folder / file).stat().st_size:
        raise ModelError(f"{name}: expected a file that was scored when it was exported, {file} is none: {ADVICE}")


def _tried(make: Callable[[], Backend], name: str, rows: list[Row], expected: list[Result]) -> Backend:
    """One that runs, and says what is expected; in 8 bits, what it loses is known. Raises ModelError for any other."""
    try:
        made = make()
        off = difference(numbers_of(made, rows), expected)
    except RaydistilError:
        raise
    except Exception as error:  # onnxruntime has a kind for every way in which a file can be wrong
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{name}: expected a file that runs, got: {reason}; {ADVICE}") from error
    rough = name in ROUGH
    if not off <= (sys.float_info.max if rough else NEAR):  # nor nan
        wanted = "numbers of the checkpoint's shape" if rough else f"what the checkpoint says within {NEAR:g}"
        raise ModelError(f"{name}: expected {wanted}, got a difference of {off:.2g}: {ADVICE}")
    return made


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
        for name, each in backends.items():
            started = time.perf_counter()
            each.run(rows)
            taken_s[name].append(time.perf_counter() - started)
    return {name: round(len(rows) / statistics.median(each), 1) for name, each in taken_s.items()}
