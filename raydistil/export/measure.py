"""What an exported file is worth: how near it is to the model, its score, its speed and its memory.

Speed and memory: each artefact in a process of its own, with so many threads, on real texts of mixed length; rounds are
interleaved, so that noise hits all alike. What PyTorch runs is measured on the GPU where it sees one, and what it holds
there is the memory that counts; ONNX files on the CPU.
"""

import multiprocessing
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from raydistil.evaluate import batches
from raydistil.heads import Inputs
from raydistil.models import (
    LOADERS,
    Headed,
    HeadedEncoder,
    load_model,
    on_device,
    quiet_transformers,
    transformer_layers,
)
from raydistil.specs import EvaluateSpec
from raydistil.types import Precision, Task, TokenBatch

Runtime = Literal["torch", "torch-bf16", "torchao", "onnx"]
CPU = torch.device("cpu")
ROUNDS, WARM_UP = 5, 10
ROWS = 200
TIMED_TOKENS = 8192  # of the texts that are timed, together: long ones are fewer


@dataclass(frozen=True, slots=True)
class Artefact:
    """Something that can be run: a directory in hub layout, as it is or in fewer bits, or an ONNX file."""

    name: str
    runtime: Runtime
    path: Path

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.runtime != "onnx" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one artefact at `threads` threads."""

    latency_p50_ms: float  # of one text
    latency_p99_ms: float
    rows_s: float  # texts a second in batches
    peak_mib: float  # resident memory, beyond what the process held before it loaded the model


def load(artefact: Artefact, task: Task, labels: tuple[str, ...], threads: int) -> Headed:
    if artefact.runtime == "onnx":
        from raydistil.export.onnx import OnnxModel

        return OnnxModel(artefact.path, threads, task)
    torch.set_num_threads(threads)
    precision: Precision = "float32" if artefact.runtime == "torch" else "bfloat16"
    if artefact.runtime == "torch":
        model = load_model(str(artefact.path), task, labels)
    else:
        quiet_transformers()
        variant = "bf16" if artefact.runtime == "torch-bf16" else None
        model = LOADERS[task].from_pretrained(artefact.path, variant=variant, dtype=torch.bfloat16)
    if artefact.runtime == "torchao" and artefact.device.type == "cuda":
        for layer in transformer_layers(model):  # without its products one by one, which are slower than float16's
            layer.compile(dynamic=True)
    return HeadedEncoder(model, task, precision).frozen().to(artefact.device)


def real_rows(spec: EvaluateSpec, most: int) -> list[TokenBatch]:
    """So many rows of the split, each alone and without padding."""
    singles = (single for batch in batches(spec) for single in _singles(batch))
    return list(islice(singles, most))


def timed_rows(spec: EvaluateSpec) -> list[TokenBatch]:
    rows = real_rows(spec, ROWS)
    ends = np.cumsum([row.num_tokens for row in rows])
    return rows[: max(WARM_UP, int((ends <= TIMED_TOKENS).sum()))]


def _singles(batch: TokenBatch) -> Iterator[TokenBatch]:
    for row in range(batch.num_rows):
        length = int(batch.lengths_B[row])
        one = slice(row, row + 1)
        yield replace(
            batch, input_ids_BL=batch.input_ids_BL[one, :length], lengths_B=batch.lengths_B[one], labels_B=None,
            labels_BL=None, tags_BL=None, spans_B2=None, num_rows=1, visits_B=batch.visits_B[one],
            positions_BL=None if batch.positions_BL is None else batch.positions_BL[one, :length],
            contexts_B=None if batch.contexts_B is None else batch.contexts_B[one],
        )  # fmt: skip


@torch.inference_mode()
def difference(
    model: Headed, reference: Headed, rows: list[TokenBatch], device: torch.device = CPU, other: torch.device = CPU
) -> float:  # fmt: skip
    """The largest between any two logits of the same text, in batches of mixed length; nan where one is no number."""
    groups = (rows[start : start + 8] for start in range(0, len(rows), 8))
    worst = [(_said(model, group, device) - _said(reference, group, other)).abs().max() for group in groups]
    return torch.stack(worst).max().item()


def _said(model: Headed, rows: list[TokenBatch], device: torch.device) -> torch.Tensor:
    """On the CPU."""
    states, logits = model(padded(rows, device), (model.num_layers,))
    made: torch.Tensor = model.vocabulary_logits(states[model.num_layers]) if logits is None else logits
    return made.cpu()


def padded(rows: list[TokenBatch], device: torch.device = CPU) -> Inputs:
    """Rows that are each alone, together."""
    contexts = [row.contexts_B for row in rows if row.contexts_B is not None]
    positions = [row.positions_BL[0] for row in rows if row.positions_BL is not None]
    both = replace(
        rows[0], input_ids_BL=_lines([row.input_ids_BL[0] for row in rows]),
        lengths_B=np.concatenate([row.lengths_B for row in rows]),
        positions_BL=_lines(positions) if positions else None,
        contexts_B=np.concatenate(contexts) if contexts else None,
    )  # fmt: skip
    return on_device(both, device)


def _lines(lines: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    """[B, L] of the longest; 0 beyond the ends of the others."""
    whole_BL = np.zeros((len(lines), max(map(len, lines))), np.int32)
    for row, line in zip(whole_BL, lines, strict=True):
        row[: len(line)] = line
    return whole_BL


# ---- speed, each in a process of its own

_loaded: dict[str, Any] = {}


def speeds(artefacts: list[Artefact], spec: EvaluateSpec, threads: int, at_once: int) -> dict[str, Speed]:
    """Of all, by their names; batches of `at_once` texts."""
    rows = timed_rows(spec)
    with ExitStack() as stack:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imported once, not by each
        pools = {each.name: stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for each in artefacts}
        for ready in [pools[each.name].submit(_prepare, each, spec, threads, rows) for each in artefacts]:
            ready.result()
        latencies = _interleaved(pools, _latencies)
        rates = _interleaved(pools, _rate, at_once)
        peaks = {name: pool.submit(_peak_mib).result() for name, pool in pools.items()}
    return {name: _speed([ms for run in latencies[name] for ms in run], rates[name], peaks[name]) for name in pools}


def _interleaved(pools: dict[str, ProcessPoolExecutor], work: Callable[..., Any], *given: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {name: [] for name in pools}
    for _ in range(ROUNDS):
        for name, pool in pools.items():
            found[name].append(pool.submit(work, *given).result())
    return found


def _speed(latencies: list[float], rates: list[float], peak_mib: float) -> Speed:
    p50, p99 = np.percentile(latencies, (50, 99)).tolist()
    return Speed(p50, p99, statistics.median(rates), peak_mib)


def _prepare(artefact: Artefact, spec: EvaluateSpec, threads: int, rows: list[TokenBatch]) -> None:
    _loaded["before_mib"], _loaded["device"] = _most_mib(artefact.device), artefact.device
    _loaded["model"], _loaded["rows"] = load(artefact, spec.task, spec.labels, threads), rows
    for row in rows[:WARM_UP]:
        _run([row])


def _run(rows: list[TokenBatch]) -> None:
    with torch.inference_mode():
        _said(_loaded["model"], rows, _loaded["device"])


def _latencies() -> list[float]:
    """Milliseconds of each text alone."""
    found = []
    for row in _loaded["rows"]:
        started = time.perf_counter()
        _run([row])
        found.append(1000 * (time.perf_counter() - started))
    return found


def _rate(at_once: int) -> float:
    """Texts a second, longest with longest."""
    rows = sorted(_loaded["rows"], key=lambda row: int(row.lengths_B[0]))
    started = time.perf_counter()
    for start in range(0, len(rows), at_once):
        _run(rows[start : start + at_once])
    return len(rows) / (time.perf_counter() - started)


def _peak_mib() -> float:
    """What the process has held at most, beyond `_loaded["before_mib"]`."""
    before_mib: float = _loaded["before_mib"]
    return max(0.0, _most_mib(_loaded["device"]) - before_mib)


def _most_mib(device: torch.device) -> float:
    """Of this program: what the one that started it held counts in `getrusage`, not in Linux's own figure."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
