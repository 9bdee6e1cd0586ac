"""bench losses: soft and hard labels over a vocabulary, the chunked pass against the plain PyTorch expression.

Both do all of it on the same numbers: the student's and the teacher's head, T^2 KL, cross-entropy, and the gradients of
features, weight and bias. Times: medians over interleaved rounds, the ratio from round to round. Peak memory: of a
process of its own, above what it held before the step.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raydistil.config.loss import LossConfig
from raydistil.losses import LossInputs, Projection, kd_and_task
from raydistil.models import DTYPES
from raydistil.types import Precision

LOSS = LossConfig(kd=5, task=2, cosine=0, temperature=2)
BERT_BASE, MINILM = 768, 384
Step = Callable[["Case"], Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """What is computed, and where: N positions, D hidden size, V vocabulary."""

    width: int
    precision: Precision
    positions: int
    vocabulary: int
    threads: int

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row of the table."""

    width: int
    precision: Precision
    plain_s: float
    chunked_s: float
    speedup: float
    plain_peak_mib: float
    chunked_peak_mib: float
    memory_share: float
    gradient_error: float  # ||dg|| / ||g||, the largest over features, weight and bias


class _Numbers:
    """The same random numbers for both sides."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(case.device)

        shape = (case.vocabulary, case.width)
        self.leaves = [draw(case.positions, case.width), 0.05 * draw(*shape), draw(case.vocabulary)]
        for leaf in self.leaves:
            leaf.requires_grad_()
        dtype = DTYPES[case.precision]
        features_ND, weight_CD, bias_C = self.leaves
        self.student = Projection(features_ND, weight_CD, bias_C, dtype)
        self.teacher = Projection(draw(case.positions, case.width), 0.05 * draw(*shape), draw(case.vocabulary), dtype)
        labels = torch.randint(case.vocabulary, (case.positions,), generator=generator)
        self.labels_N = labels.to(case.device)


def plain(numbers: _Numbers) -> Tensor:
    """The DistilBERT expression as one writes it: both models' logits at all positions, then the losses."""
    student, teacher, t = numbers.student, numbers.teacher, LOSS.temperature
    student_NV = F.linear(student.features_ND, student.weight_CD, student.bias_C).float()
    with torch.no_grad():
        teacher_NV = F.linear(teacher.features_ND, teacher.weight_CD, teacher.bias_C).float()
    soft = F.kl_div(F.log_softmax(student_NV / t, -1), F.softmax(teacher_NV / t, -1), reduction="batchmean") * t**2
    return LOSS.kd * soft + LOSS.task * F.cross_entropy(student_NV, numbers.labels_N)


def chunked(numbers: _Numbers) -> Tensor:
    """Ours."""
    inputs = LossInputs(numbers.student, numbers.labels_N, numbers.teacher)
    return kd_and_task(inputs, LOSS, LOSS.kd, LOSS.task).loss


SIDES = {"plain": plain, "chunked": chunked}


def bench_losses(
    widths: tuple[int, ...], positions: int, vocabulary: int, rounds: int, threads: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Rows of both precisions for every width; see the module."""
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    cases = [Case(width, precision, positions, vocabulary, threads) for width in widths for precision in precisions]
    rows = []
    for case in cases:
        rows.append(asdict(_outcome(case, rounds)))
        say(f"{case.width} wide, {case.precision}: {rows[-1]['speedup']:.2f}x")
    setting = {"device": cases[0].device, "positions": positions, "vocabulary": vocabulary, "threads": threads}
    return setting | {"rows": rows}


def _outcome(case: Case, rounds: int) -> Outcome:
    torch.set_num_threads(case.threads)
    numbers = _Numbers(case)
    gradients = {name: _gradients(case, numbers, name) for name in SIDES}  # warms up, too
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name, measured in times.items():
            measured.append(_seconds(case, numbers, name))
    peaks = {name: _peak_elsewhere(case, name) / 2**20 for name in SIDES}
    ratio = statistics.median(p / c for p, c in zip(times["plain"], times["chunked"], strict=True))
    return Outcome(
        case.width, case.precision, statistics.median(times["plain"]), statistics.median(times["chunked"]), ratio,
        peaks["plain"], peaks["chunked"], peaks["chunked"] / peaks["plain"],
        max(_error(a, b) for a, b in zip(gradients["plain"], gradients["chunked"], strict=True)),
    )  # fmt: skip


def _step(case: Case, numbers: _Numbers, name: str) -> None:
    """Forward and backward."""
    for leaf in numbers.leaves:
        leaf.grad = None
    dtype = DTYPES[case.precision]
    with torch.autocast(case.device, dtype, enabled=dtype != torch.float32):
        loss = SIDES[name](numbers)
    loss.backward()  # type: ignore[no-untyped-call]
    if case.device == "cuda":
        torch.cuda.synchronize()


def _seconds(case: Case, numbers: _Numbers, name: str) -> float:
    started = time.perf_counter()
    _step(case, numbers, name)
    return time.perf_counter() - started


def _gradients(case: Case, numbers: _Numbers, name: str) -> list[Tensor]:
    _step(case, numbers, name)
    return [leaf.grad.clone() for leaf in numbers.leaves if leaf.grad is not None]


def _error(expected: Tensor, got: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


# ---- memory


def _peak_elsewhere(case: Case, name: str) -> int:
    """Bytes of one step at its peak, in a process that does nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (case, name))


def _peak(case: Case, name: str) -> int:
    torch.set_num_threads(case.threads)
    numbers = _Numbers(case)
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _step(case, numbers, name)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    _step(case, numbers, name)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """A line of this process's memory, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
