"""Divergences and their closed-form gradients: numbers by hand, laws, and autograd's finite differences."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raydistil.losses.divergences import (
    Graded,
    cross_entropy,
    forward_kl,
    jensen_shannon,
    logit_mse,
    reverse_kl,
    squared_error,
    total_variation,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LN3 = math.log(3)
SEEDS = st.integers(0, 10_000)
HALF, THREE_TO_ONE = torch.tensor([[0.0, 0.0]]), torch.tensor([[LN3, 0.0]])  # (1/2, 1/2) and (3/4, 1/4)
KL_TO_HALF = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # KL((3/4, 1/4) || (1/2, 1/2))
KL_FROM_HALF = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)


def js(student: Tensor, teacher: Tensor, temperature: float) -> Graded:
    return jensen_shannon(student, teacher, temperature, 0.3)


def mse(student: Tensor, teacher: Tensor, temperature: float) -> Graded:
    return logit_mse(student, teacher)


ALL = [forward_kl, reverse_kl, js, total_variation, mse]
Divergence = Callable[[Tensor, Tensor, float], Graded]


class WithGradient(torch.autograd.Function):
    """A function whose gradient is the one it gives itself."""

    @staticmethod
    def forward(ctx: Any, logits_NC: Tensor, of: Callable[[Tensor], Graded]) -> Tensor:
        loss_N, grad_NC = of(logits_NC.detach().clone())
        ctx.save_for_backward(grad_NC)
        return loss_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * grad_N[:, None], None


def made(seed: int, rows: int = 4, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return student, teacher


# ---- numbers by hand


def test_forward_kl_looks_from_the_teacher() -> None:
    assert forward_kl(HALF, THREE_TO_ONE, 1.0)[0].item() == pytest.approx(KL_TO_HALF, abs=1e-7)
    assert forward_kl(THREE_TO_ONE, HALF, 1.0)[0].item() == pytest.approx(KL_FROM_HALF, abs=1e-7)


def test_reverse_kl_looks_from_the_student() -> None:
    assert reverse_kl(HALF, THREE_TO_ONE, 1.0)[0].item() == pytest.approx(KL_FROM_HALF, abs=1e-7)
    assert reverse_kl(THREE_TO_ONE, HALF, 1.0)[0].item() == pytest.approx(KL_TO_HALF, abs=1e-7)


@pytest.mark.parametrize("kl", [forward_kl, reverse_kl])
def test_kl_softens_by_the_temperature_and_scales_by_its_square(kl: Divergence) -> None:
    assert kl(HALF, 2 * THREE_TO_ONE, 2.0)[0].item() == pytest.approx(4 * kl(HALF, THREE_TO_ONE, 1.0)[0].item())


def test_jensen_shannon_at_one_half_by_hand() -> None:
    """m = (5/8, 3/8): the mean of KL((3/4, 1/4) || m) and KL((1/2, 1/2) || m)."""
    to_teacher = 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)
    to_student = 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
    loss_N, _ = jensen_shannon(HALF, THREE_TO_ONE, 1.0, 0.5)
    assert loss_N.item() == pytest.approx((to_teacher + to_student) / 2, abs=1e-7)
    assert jensen_shannon(THREE_TO_ONE, HALF, 1.0, 0.5)[0].item() == pytest.approx(loss_N.item(), abs=1e-7)


def test_total_variation_by_hand() -> None:
    assert total_variation(HALF, THREE_TO_ONE, 1.0)[0].item() == pytest.approx(0.25, abs=1e-7)
    assert total_variation(HALF, 2 * THREE_TO_ONE, 2.0)[0].item() == pytest.approx(0.5, abs=1e-7)


def test_logit_mse_by_hand() -> None:
    loss_N, grad_NC = logit_mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 5.0]]))
    assert loss_N.item() == 5
    assert grad_NC.tolist() == [[1.0, -3.0]]


def test_cross_entropy_by_hand() -> None:
    loss_N, grad_NC = cross_entropy(torch.cat([THREE_TO_ONE, THREE_TO_ONE]), torch.tensor([0, 1]), 0.0)
    assert loss_N.tolist() == pytest.approx([-math.log(0.75), -math.log(0.25)])
    assert grad_NC.flatten().tolist() == pytest.approx([-0.25, 0.25, 0.75, -0.75])


def test_smoothing_gives_some_of_the_label_to_all_classes() -> None:
    loss_N, _ = cross_entropy(THREE_TO_ONE, torch.tensor([0]), 0.2)
    assert loss_N.item() == pytest.approx(-0.9 * math.log(0.75) - 0.1 * math.log(0.25), abs=1e-6)


def test_squared_error_by_hand() -> None:
    loss_N, grad_N1 = squared_error(torch.tensor([[3.0], [1.0]]), torch.tensor([1.0, 2.0]))
    assert loss_N.tolist() == [4, 1]
    assert grad_N1.tolist() == [[4.0], [-2.0]]


# ---- gradients and laws


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradients_are_those_of_the_function(divergence: Divergence, temperature: float) -> None:
    student, teacher = made(0)
    of = lambda logits: WithGradient.apply(logits, lambda s: divergence(s, teacher.clone(), temperature))  # noqa: E731
    assert torch.autograd.gradcheck(of, (student.requires_grad_(),))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_of_cross_entropy_is_that_of_the_function(smoothing: float) -> None:
    student, _ = made(0)
    labels = torch.tensor([0, 4, 2, 2])
    of = lambda logits: WithGradient.apply(logits, lambda s: cross_entropy(s, labels, smoothing))  # noqa: E731
    assert torch.autograd.gradcheck(of, (student.requires_grad_(),))


@given(SEEDS, st.sampled_from(ALL), st.floats(0.5, 8))
def test_nothing_for_equal_distributions_and_never_negative(
    seed: int, divergence: Divergence, temperature: float
) -> None:
    student, teacher = made(seed)
    loss_N, grad_NC = divergence(student, student.clone(), temperature)
    assert loss_N.abs().max() < 1e-12
    assert grad_NC.abs().max() < 1e-12
    assert (divergence(student, teacher, temperature)[0] > 0).all()


@given(SEEDS, st.sampled_from([forward_kl, reverse_kl, js, total_variation]), st.floats(-50, 50))
def test_a_shift_of_all_logits_changes_nothing(seed: int, divergence: Divergence, shift: float) -> None:
    student, teacher = made(seed)
    moved, still = divergence(student + shift, teacher, 2.0), divergence(student, teacher, 2.0)
    torch.testing.assert_close(moved, still)
    assert moved[1].sum(-1).abs().max() < 1e-12  # so the gradient points across the shifts


@given(SEEDS)
def test_the_inputs_are_left_as_they_were(seed: int) -> None:
    for divergence in ALL:
        student, teacher = made(seed)
        before = student.clone(), teacher.clone()
        divergence(student, teacher, 1.0)
        divergence(student, teacher, 2.0)
        assert torch.equal(student, before[0])
        assert torch.equal(teacher, before[1])


def test_the_gradient_of_kl_hardly_depends_on_a_high_temperature() -> None:
    """That is what T^2 is for: for high T the gradient tends to (s - t) / C where both sum to 0 (Hinton)."""
    student = torch.tensor([[0.3, -0.1, -0.2]], dtype=torch.float64)
    teacher = torch.tensor([[-0.5, 0.2, 0.3]], dtype=torch.float64)
    assert torch.allclose(forward_kl(student, teacher, 1000.0)[1], (student - teacher) / 3, atol=1e-3)
