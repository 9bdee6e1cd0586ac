"""Soft and hard labels together: KD from the teacher's distribution, cross-entropy with the data's. Of a regression,
whose one logit is a number, the squared distances to both.

One pass makes both losses and their gradient. Where the logits would be [tokens, vocabulary] they are never made as a
whole: blocks of places go through the head, the loss and the head's backward one after the other, so that what exists
at once is a few hundred rows of them. The gradient is worked out in the forward pass and scaled in the backward one
(as in Wijmans et al. 2024, arXiv:2411.09009, and others for plain cross-entropy).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raydistil.config.loss import LossConfig
from raydistil.ensemble import mixed
from raydistil.losses.divergences import cross_entropy, divergence, squared_error
from raydistil.losses.inputs import LossInputs, LossOutputs, Projection
from raydistil.losses.sparse import sparse_kl
from raydistil.losses.tied import Tied
from raydistil.types import IGNORE, Mixture, Sparse

ROWS_PER_PRODUCT = 1024  # places that go through the head at once: enough for the matrix products to run at full speed
ROWS_PER_PASS = 16  # places a CPU takes the elementwise passes over at once, so that they stay in its cache
ROWS_PER_LAUNCH = 256  # and another device: enough to keep it at work, few enough to be small beside the logits


def kd_and_task(inputs: LossInputs, config: LossConfig, kd: float, task: float) -> LossOutputs:
    """kd * KD + task * CE: means over the places that are compared and over those that have a label (of numbers: MSE).

    KD: `config.divergence` at `config.temperature` (see `divergences`). The metrics hold both unweighted, of those
    that have a weight.
    """
    compared = _Compared(inputs, config, kd, task)
    with torch.autocast(inputs.labels_N.device.type, enabled=False):
        loss, sums = _apply(inputs.student_logits, compared)
    names = [name for name, weight in (("kd", kd), ("task", task)) if weight]
    return LossOutputs(loss, {name: sums[("kd", "task").index(name)] for name in names})


def _apply(logits: Tensor | Projection, compared: "_Compared") -> tuple[Tensor, Tensor]:
    if isinstance(logits, Projection):
        parts = (logits.features_ND, logits.weight_CD, logits.bias_C, logits.dtype, logits.tied)
        return _FromFeatures.apply(*parts, compared)  # type: ignore[no-untyped-call, no-any-return]
    return _FromLogits.apply(logits, compared)  # type: ignore[no-untyped-call, no-any-return]


@dataclass(frozen=True, slots=True)
class _Block:
    """Some of the places: their logits, in a dtype to reckon in."""

    rows: slice
    student_nC: Tensor
    teacher: Tensor | Sparse | None


class _Compared:
    """What the student's logits are held against, and how much each place counts."""

    def __init__(self, inputs: LossInputs, config: LossConfig, kd: float, task: float) -> None:
        assert inputs.teacher_logits is not None or not kd, "soft labels need the teacher's side"
        self.teacher = inputs.teacher_logits if kd else None
        self._config = config
        self._labels_N = inputs.labels_N
        self._weights = (kd, task)
        self._kd_N = torch.ones_like(inputs.labels_N, dtype=torch.bool) if inputs.kd_N is None else inputs.kd_N
        numbers = inputs.labels_N.is_floating_point()
        self._has_label_N = inputs.labels_N.isfinite() if numbers else inputs.labels_N != IGNORE
        if not task:
            self._has_label_N = torch.zeros_like(self._has_label_N)
        self._counts = (self._kd_N.sum().clamp(min=1), self._has_label_N.sum().clamp(min=1))

    def __len__(self) -> int:
        return len(self._labels_N)

    def mean(self, sums: Tensor) -> Tensor:
        """[KD, CE] as means, out of their sums."""
        return sums / torch.stack(self._counts)

    def total(self, means: Tensor) -> Tensor:
        return (means * means.new_tensor(self._weights)).sum()

    def graded(self, block: _Block) -> tuple[Tensor, Tensor]:
        """(sums of KD and CE over the block's places, gradient of the total in the block's logits)."""
        kd, task = self._weights
        sums, grad_nC = block.student_nC.new_zeros(2), None
        if kd:
            loss_n, grad_nC = self._kd(block)
            at_n = self._kd_N[block.rows].to(loss_n.dtype)
            sums[0] = loss_n @ at_n
            grad_nC.mul_((at_n * (kd / self._counts[0]))[:, None])
        if grad_nC is None:
            grad_nC = torch.zeros_like(block.student_nC)
        labelled_n = self._has_label_N[block.rows].nonzero()[:, 0]
        if len(labelled_n):
            loss_n, task_grad_nC = self._task(block, labelled_n)
            sums[1] = loss_n.sum()
            _add_rows(grad_nC, labelled_n, task_grad_nC.mul_(task / self._counts[1]))
        return sums, grad_nC

    def _kd(self, block: _Block) -> tuple[Tensor, Tensor]:
        if isinstance(block.teacher, Sparse):
            return sparse_kl(block.student_nC, block.teacher, self._config.temperature)
        assert block.teacher is not None
        return divergence(block.student_nC, block.teacher, self._config)

    def _task(self, block: _Block, labelled_n: Tensor) -> tuple[Tensor, Tensor]:
        everywhere = len(labelled_n) == len(block.student_nC)
        logits_nC = block.student_nC if everywhere else block.student_nC[labelled_n]
        labels_n = self._labels_N[block.rows][labelled_n]
        if labels_n.is_floating_point():
            return squared_error(logits_nC, labels_n)
        return cross_entropy(logits_nC, labels_n, self._config.label_smoothing)


class _FromLogits(torch.autograd.Function):
    """Losses of logits that are there."""

    @staticmethod
    def forward(ctx: Any, logits_NC: Tensor, compared: _Compared) -> tuple[Tensor, Tensor]:
        assert not isinstance(compared.teacher, Projection)
        whole = slice(None)
        block = _Block(whole, logits_NC, _taught(compared.teacher, None, whole, logits_NC.dtype))
        sums, grad_NC = compared.graded(block)
        means = compared.mean(sums)
        ctx.save_for_backward(grad_NC)
        ctx.mark_non_differentiable(means)
        return compared.total(means), means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (grad_NC,) = ctx.saved_tensors
        return _scaled(grad_NC, grad_loss), None


class _FromFeatures(torch.autograd.Function):
    """Losses of a projection, and the gradients of its features, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, features_ND: Tensor, weight_CD: Tensor, bias_C: Tensor | None, dtype: torch.dtype | None,
        tied: Tied | None, compared: _Compared,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        head = _ChunkedHead(Projection(features_ND, weight_CD, bias_C, dtype), learns=ctx.needs_input_grad[1])
        means = compared.mean(head.run(compared))
        ctx.save_for_backward(head.grad_features_ND, head.grad_weight_CD, head.grad_bias_C)
        ctx.tied = tied
        ctx.mark_non_differentiable(means)
        return compared.total(means), means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        features_ND, weight_CD, bias_C = (
            None if part is None else _scaled(part, grad_loss) for part in ctx.saved_tensors
        )
        if ctx.tied is not None and weight_CD is not None:
            ctx.tied.leave(weight_CD)
            weight_CD = None
        return features_ND, weight_CD, bias_C, None, None, None


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """As it is where nothing is to be done: a vocabulary's gradient is too large to go over once more. (On another
    device than a CPU one would have to wait for the factor.)"""
    return grad if factor.device.type == "cpu" and factor == 1 else grad * factor


class _Logits:
    """A projection's logits, some places at a time, written to the same memory over and over; without the bias.

    Fresh memory of that size would come from the system every time, page by page, as slowly as the matrix product.
    """

    def __init__(self, head: Projection, dtype: torch.dtype) -> None:
        self._head = head
        self.weight_CD = head.weight_CD.to(dtype)
        self._room_nC = self.weight_CD.new_empty(min(len(head), ROWS_PER_PRODUCT), len(self.weight_CD))

    def of(self, rows: slice) -> Tensor:
        features_nD = self._head.features_ND[rows].to(self.weight_CD.dtype)
        return torch.mm(features_nD, self.weight_CD.T, out=self._room_nC[: len(features_nD)])


class _ChunkedHead:
    """A student's head, run forward and backward on ROWS_PER_PRODUCT places at a time.

    Matrix products run in the student's `dtype`; all else in float32 (float64 where that is given).
    """

    def __init__(self, student: Projection, learns: bool) -> None:
        """`learns`: whether its weight wants a gradient; a frozen one saves the matrix product for it."""
        self._student = student
        self._device = student.features_ND.device.type
        self._exact = torch.float64 if student.weight_CD.dtype == torch.float64 else torch.float32
        self._dtype = student.dtype or student.weight_CD.dtype
        self._logits = _Logits(student, self._dtype)
        self._learns = learns
        self.grad_features_ND = torch.empty_like(student.features_ND)
        self.grad_weight_CD: Tensor | None = None  # made by the first places
        self.grad_bias_C = None if student.bias_C is None else torch.zeros_like(student.bias_C)

    def run(self, compared: _Compared) -> Tensor:
        """Sums of KD and CE over all places; the gradients are added up on the way."""
        teacher = _Logits(compared.teacher, self._dtype) if isinstance(compared.teacher, Projection) else None
        sums = self._student.weight_CD.new_zeros(2, dtype=self._exact)
        for start in range(0, len(self._student), ROWS_PER_PRODUCT):
            rows = slice(start, min(start + ROWS_PER_PRODUCT, len(self._student)))
            logits_nC = self._logits.of(rows)
            sums += self._losses(compared, rows, logits_nC, None if teacher is None else teacher.of(rows))
            self._add_gradients(rows, logits_nC)
        if self._learns and self.grad_weight_CD is None:
            self.grad_weight_CD = torch.zeros_like(self._student.weight_CD)
        return sums

    def _losses(self, compared: _Compared, rows: slice, logits_nC: Tensor, taught_nC: Tensor | None) -> Tensor:
        """Sums of KD and CE over `rows`; their gradient then stands in `logits_nC`, 0 of those that do not count."""
        sums = logits_nC.new_zeros(2, dtype=self._exact)
        counted = max(0, min(len(logits_nC), len(compared) - rows.start))
        logits_nC[counted:] = 0
        for part in _passes(counted, self._device):
            student_rC = _biased(logits_nC[part], self._student.bias_C, self._exact)
            where = slice(rows.start + part.start, rows.start + part.stop)
            made_rC = None if taught_nC is None else taught_nC[part]
            taught = _taught(compared.teacher, made_rC, where, self._exact)
            part_sums, grad_rC = compared.graded(_Block(where, student_rC, taught))
            sums += part_sums
            if self.grad_bias_C is not None:
                self.grad_bias_C += grad_rC.sum(0)
            logits_nC[part] = grad_rC
        return sums

    def _add_gradients(self, rows: slice, grad_nC: Tensor) -> None:
        self.grad_features_ND[rows] = grad_nC @ self._logits.weight_CD
        if not self._learns:
            return
        features_nD = self._student.features_ND[rows].to(self._dtype)
        if self.grad_weight_CD is None:
            self.grad_weight_CD = (grad_nC.T @ features_nD).to(self._student.weight_CD.dtype)
        elif self._dtype == self.grad_weight_CD.dtype:
            self.grad_weight_CD.addmm_(grad_nC.T, features_nD)
        else:
            self.grad_weight_CD += grad_nC.T @ features_nD


def _add_rows(total_nC: Tensor, rows_m: Tensor, part_mC: Tensor) -> None:
    """Add to some rows; a plain sum, which is several times faster, where they are all of them."""
    if len(rows_m) == len(total_nC):
        total_nC += part_mC
    else:
        total_nC.index_add_(0, rows_m, part_mC)


def _taught(
    teacher: Tensor | Projection | Sparse | Mixture | None, made_rC: Tensor | None, where: slice, dtype: torch.dtype
) -> Tensor | Sparse | None:
    """The teacher's side of some places: as it came, or logits made of its projection, or of what several say."""
    if isinstance(teacher, Projection):
        assert made_rC is not None
        return _biased(made_rC, teacher.bias_C, dtype)
    if isinstance(teacher, Tensor):
        return teacher[where].to(dtype)
    if isinstance(teacher, Mixture):
        return mixed(teacher.rows(where)).to(dtype)
    return None if teacher is None else teacher.rows(where)


def _passes(num_rows: int, device: str) -> Iterator[slice]:
    step = ROWS_PER_PASS if device == "cpu" else ROWS_PER_LAUNCH
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def _biased(logits_nC: Tensor, bias_C: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`logits_nC` with the bias, in `dtype`; written in place where it has that dtype already."""
    wide_nC = logits_nC.to(dtype)
    return wide_nC if bias_C is None else wide_nC.add_(bias_C)
