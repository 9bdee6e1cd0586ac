"""The loss over sparse soft labels and its gradient."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raydistil.losses.sparse import sparse_kl
from raydistil.types import Sparse

pytestmark = pytest.mark.usefixtures("one_thread")


class SparseKl(torch.autograd.Function):
    """The closed form behind autograd's interface."""

    @staticmethod
    def forward(ctx: Any, logits_NC: Tensor, sparse: Sparse, temperature: float) -> Tensor:
        loss_N, grad_NC = sparse_kl(logits_NC, sparse, temperature)
        ctx.save_for_backward(grad_NC)
        return loss_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][:, None] * ctx.saved_tensors[0], None, None


def labels(places: int, classes: int, kept: int, tail: bool, seed: int) -> Sparse:
    """Made soft labels in float64 whose entries and tail sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(places, kept + 1, generator=generator, dtype=torch.float64) + 0.01
    weights[:, -1] *= tail
    weights /= weights.sum(-1, keepdim=True)
    ids_NK = torch.rand(places, classes, generator=generator).argsort(-1)[:, :kept]
    return Sparse(ids_NK, weights[:, :-1], weights[:, -1])


def student(places: int, classes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return 3 * torch.randn(places, classes, generator=generator, dtype=torch.float64)


def written_out(logits_NC: Tensor, sparse: Sparse, temperature: float) -> Tensor:
    """The loss as its definition reads, differentiable."""
    q_NC = (logits_NC / temperature).softmax(-1)
    q_NK = q_NC.gather(-1, sparse.ids_NK)
    terms_N = (sparse.probs_NK * (sparse.probs_NK / q_NK).log()).sum(-1)
    inside_NC = torch.zeros_like(q_NC, dtype=torch.bool).scatter_(-1, sparse.ids_NK, True)
    rest_N = q_NC.masked_fill(inside_NC, 0).sum(-1)
    smallest = torch.finfo(torch.float64).tiny  # a tail of 0 times a finite logarithm is 0
    tails_N = sparse.tail_N * (sparse.tail_N.clamp(min=smallest) / rest_N.clamp(min=smallest)).log()
    return temperature**2 * (terms_N + tails_N)


def test_one_entry_of_three_classes_by_hand() -> None:
    sparse = Sparse(torch.tensor([[1]]), torch.tensor([[0.5]]), torch.tensor([0.5]))
    loss_N, grad_NC = sparse_kl(torch.zeros(1, 3), sparse, 1.0)
    assert loss_N.item() == pytest.approx(0.5 * math.log(1.5) + 0.5 * math.log(0.75), rel=1e-6)
    assert grad_NC.tolist()[0] == pytest.approx([1 / 12, -1 / 6, 1 / 12], rel=1e-5)


@given(st.integers(1, 4), st.integers(2, 9), st.integers(1, 9), st.booleans(), st.sampled_from([0.5, 1.0, 3.0]))
def test_loss_and_gradient_are_those_of_the_definition(
    places: int, classes: int, kept: int, tail: bool, temperature: float
) -> None:
    kept = min(kept, classes)
    sparse = labels(places, classes, kept, tail and kept < classes, seed=kept)
    logits_NC = student(places, classes, seed=places).requires_grad_()
    expected_N = written_out(logits_NC, sparse, temperature)
    (expected_NC,) = torch.autograd.grad(expected_N.sum(), logits_NC)
    loss_N, grad_NC = sparse_kl(logits_NC, sparse, temperature)
    assert torch.allclose(loss_N, expected_N, rtol=1e-10, atol=1e-12)
    assert torch.allclose(grad_NC, expected_NC, rtol=1e-10, atol=1e-12)
    assert not loss_N.requires_grad and not grad_NC.requires_grad
    single_N, single_NC = sparse_kl(logits_NC.float(), sparse, temperature)
    assert torch.allclose(single_N.double(), expected_N, rtol=1e-4, atol=1e-5)
    assert torch.allclose(single_NC.double(), expected_NC, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kept", "tail"), [(3, True), (3, False), (7, False)])
def test_the_gradient_passes_gradcheck(kept: int, tail: bool) -> None:
    logits_NC = student(3, 7, seed=5).requires_grad_()
    sparse = labels(3, 7, kept, tail, seed=6)
    assert torch.autograd.gradcheck(lambda logits: SparseKl.apply(logits, sparse, 2.0), (logits_NC,))


@given(st.integers(1, 4), st.integers(1, 8), st.sampled_from([0.5, 1.0, 3.0]))
def test_with_every_class_it_is_the_full_divergence(places: int, classes: int, temperature: float) -> None:
    teacher_NC, logits_NC = student(places, classes, seed=9), student(places, classes, seed=3).requires_grad_()
    order_NC = torch.rand(places, classes).argsort(-1)
    probs_NC = (teacher_NC / temperature).softmax(-1)
    sparse = Sparse(order_NC, probs_NC.gather(-1, order_NC), torch.zeros(places, dtype=torch.float64))
    full_N = temperature**2 * F.kl_div(
        (logits_NC / temperature).log_softmax(-1), probs_NC, reduction="none"
    ).sum(-1)  # fmt: skip
    (expected_NC,) = torch.autograd.grad(full_N.sum(), logits_NC)
    loss_N, grad_NC = sparse_kl(logits_NC, sparse, temperature)
    assert torch.allclose(loss_N, full_N, rtol=1e-10, atol=1e-12)
    assert torch.allclose(grad_NC, expected_NC, rtol=1e-10, atol=1e-12)


@given(st.integers(1, 4), st.booleans(), st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_padding_changes_nothing_whatever_its_ids(kept: int, tail: bool, padding: list[int]) -> None:
    sparse = labels(3, 6, kept, tail, seed=kept)
    padding_NK = torch.tensor(padding).expand(3, -1)
    padded = Sparse(
        torch.cat([padding_NK, sparse.ids_NK], -1),
        torch.cat([torch.zeros_like(padding_NK, dtype=torch.float64), sparse.probs_NK], -1),
        sparse.tail_N,
    )
    logits_NC = student(3, 6, seed=2)
    for plain, other in zip(sparse_kl(logits_NC, sparse, 2.0), sparse_kl(logits_NC, padded, 2.0), strict=True):
        assert torch.allclose(plain, other, rtol=1e-12, atol=1e-14)


def test_a_student_that_is_sure_of_an_entry_still_learns_of_the_tail() -> None:
    """q outside the entry is e^-200, 0 in float32; its logarithm and the gradient are not."""
    sparse = Sparse(torch.tensor([[0]]), torch.tensor([[0.5]]), torch.tensor([0.5]))
    loss_N, grad_NC = sparse_kl(torch.tensor([[200.0, 0.0, math.log(3.0)]]), sparse, 1.0)
    assert loss_N.item() == pytest.approx(math.log(0.5) + 0.5 * (200 - math.log(4)), rel=1e-6)
    assert grad_NC.tolist()[0] == pytest.approx([0.5, -0.125, -0.375], rel=1e-5)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_students_have_finite_losses(scale: float) -> None:
    sparse = labels(4, 6, 2, True, seed=0)
    loss_N, grad_NC = sparse_kl((scale * student(4, 6, seed=0)).float(), sparse, 1.0)
    assert torch.isfinite(loss_N).all() and torch.isfinite(grad_NC).all()
    assert grad_NC.sum(-1).abs().max() < 1e-5


def test_the_students_logits_are_read_in_any_type_and_left_alone() -> None:
    sparse = labels(2, 5, 2, True, seed=0)
    for dtype, expected in [
        (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64),
    ]:  # fmt: skip
        logits_NC = student(2, 5, seed=0).to(dtype)
        before_NC = logits_NC.clone()
        loss_N, grad_NC = sparse_kl(logits_NC, sparse, 1.0)
        assert (loss_N.dtype, grad_NC.dtype) == (expected, expected)
        assert torch.equal(logits_NC, before_NC)


@pytest.mark.parametrize("width", [0, 3])
def test_no_places_at_all(width: int) -> None:
    sparse = Sparse(torch.zeros(0, width, dtype=torch.int64), torch.zeros(0, width), torch.zeros(0))
    loss_N, grad_NC = sparse_kl(torch.zeros(0, 5), sparse, 1.0)
    assert (tuple(loss_N.shape), tuple(grad_NC.shape)) == ((0,), (0, 5))
