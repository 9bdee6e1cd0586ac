"""The terms of the loss: closed-form numbers, gradients and laws."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raydistil.config import LossConfig
from raydistil.losses import LossInputs, combined, cosine, kd, task
from raydistil.types import IGNORE

pytestmark = pytest.mark.usefixtures("one_thread")

LN3 = math.log(3)
SEEDS = st.integers(0, 10_000)


def logit(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows)


def inputs(student: Tensor, teacher: Tensor | None = None, labels: Tensor | None = None) -> LossInputs:
    """Inputs that compare logits; the hidden states are the logits themselves."""
    labels = torch.zeros(len(student), dtype=torch.int64) if labels is None else labels
    return LossInputs(student, labels, student, teacher, teacher)


def made(seed: int, rows: int = 4, classes: int = 5) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)
    student, teacher, hidden, teacher_hidden = torch.randn(4, rows, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    labels[0] = IGNORE
    return LossInputs(student, labels, hidden, teacher, teacher_hidden)


# ---- kd


def test_kd_of_two_classes_by_hand() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2)."""
    out = kd(inputs(logit((0.0, 0.0)), logit((LN3, 0.0))), 1.0)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert out.loss.item() == pytest.approx(expected, abs=1e-7)
    assert out.metrics["kd"].item() == out.loss.item()


def test_kd_softens_by_the_temperature_and_scales_by_its_square() -> None:
    """At T = 2 the logits 2 ln 3 and 0 are the same (3/4, 1/4), and the loss is 2^2 times the KL."""
    out = kd(inputs(logit((0.0, 0.0)), logit((2 * LN3, 0.0))), 2.0)
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert out.loss.item() == pytest.approx(expected, abs=1e-6)


def test_kd_looks_from_the_teacher_to_the_student() -> None:
    """KL is not symmetric: teacher (1/2, 1/2), student (3/4, 1/4) is 1/2 ln(2/3) + 1/2 ln 2."""
    out = kd(inputs(logit((LN3, 0.0)), logit((0.0, 0.0))), 1.0)
    assert out.loss.item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-7)


def test_kd_is_a_mean_over_the_places() -> None:
    two = inputs(logit((0.0, 0.0), (1.0, 1.0)), logit((LN3, 0.0), (5.0, 5.0)))
    assert kd(two, 1.0).loss.item() == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2, abs=1e-7)


@given(SEEDS, st.floats(0.5, 8))
def test_kd_is_nothing_for_equal_logits_and_never_negative(seed: int, temperature: float) -> None:
    same = made(seed)
    equal = LossInputs(same.student_logits_NC, same.labels_N, same.student_hidden_TD, same.student_logits_NC + 3.5)
    assert kd(equal, temperature).loss.item() == pytest.approx(0, abs=1e-12)
    assert kd(made(seed), temperature).loss.item() > 0


def test_the_gradient_of_kd_hardly_depends_on_a_high_temperature() -> None:
    """That is what T^2 is for: for high T the gradient tends to (s - t) / C where both sum to 0 (Hinton)."""
    student = torch.tensor([[0.3, -0.1, -0.2]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-0.5, 0.2, 0.3]], dtype=torch.float64)
    kd(inputs(student, teacher), 1000.0).loss.backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, (student.detach() - teacher) / 3, atol=1e-3)


# ---- task


def test_task_is_the_mean_over_the_labelled_places() -> None:
    """-ln(3/4) where the label is the likelier class, -ln(1/4) where not, and nothing where there is no label."""
    student = logit((LN3, 0.0), (LN3, 0.0), (9.0, -9.0))
    out = task(inputs(student, labels=torch.tensor([0, 1, IGNORE])))
    assert out.loss.item() == pytest.approx((-math.log(0.75) - math.log(0.25)) / 2, abs=1e-6)
    assert out.metrics["task"].item() == out.loss.item()


def test_task_is_nothing_where_no_place_has_a_label() -> None:
    student = torch.randn(3, 4, requires_grad=True)
    out = task(inputs(student, labels=torch.full((3,), IGNORE)))
    out.loss.backward()
    assert out.loss.item() == 0
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros(3, 4))


# ---- cosine


def test_cosine_by_hand() -> None:
    """Same direction 0, right angle 1, opposite 2, 60 degrees 1/2: the mean is 3.5 / 4."""
    student = logit((1.0, 0.0), (0.0, 2.0), (1.0, 1.0), (1.0, 0.0))
    teacher = logit((5.0, 0.0), (3.0, 0.0), (-1.0, -1.0), (0.5, math.sqrt(3) / 2))
    out = cosine(inputs(student, teacher))
    assert out.loss.item() == pytest.approx(3.5 / 4, abs=1e-6)
    assert out.metrics["cosine"].item() == out.loss.item()


# ---- empty micro-batches, gradients and the sum


def test_no_places_give_no_loss_and_no_nan() -> None:
    empty = inputs(torch.zeros(0, 5, requires_grad=True), torch.zeros(0, 5))
    out = combined(empty, LossConfig())
    out.loss.backward()
    assert {name: value.item() for name, value in out.metrics.items()} == {"loss": 0, "kd": 0, "task": 0, "cosine": 0}


@pytest.mark.parametrize(
    "loss", [lambda x: kd(x, 2.0).loss, lambda x: task(x).loss, lambda x: cosine(x).loss], ids=["kd", "task", "cosine"]
)
def test_gradients_are_those_of_the_function(loss: Callable[[LossInputs], Tensor]) -> None:
    base = made(0)

    def of(logits_NC: Tensor, hidden_TD: Tensor) -> Tensor:
        given = LossInputs(logits_NC, base.labels_N, hidden_TD, base.teacher_logits_NC, base.teacher_hidden_TD)
        return loss(given) + 0 * (logits_NC.sum() + hidden_TD.sum())

    tensors = (base.student_logits_NC.requires_grad_(), base.student_hidden_TD.requires_grad_())
    assert torch.autograd.gradcheck(of, tensors)


@given(SEEDS, st.floats(0.1, 9), st.floats(0.1, 9), st.floats(0.1, 9))
def test_the_sum_is_weighted_and_the_metrics_are_not(seed: int, a: float, b: float, c: float) -> None:
    batch = made(seed)
    out = combined(batch, LossConfig(kd=a, task=b, cosine=c, temperature=3.0))
    terms = {"kd": kd(batch, 3.0).loss, "task": task(batch).loss, "cosine": cosine(batch).loss}
    assert {name: out.metrics[name].item() for name in terms} == {name: loss.item() for name, loss in terms.items()}
    assert out.loss.item() == pytest.approx(sum(w * t.item() for w, t in zip((a, b, c), terms.values(), strict=True)))
    assert out.metrics["loss"].item() == out.loss.item()


def test_metrics_hold_no_graph() -> None:
    batch = made(0)
    batch.student_logits_NC.requires_grad_()
    out = combined(batch, LossConfig())
    assert out.loss.requires_grad
    assert not any(value.requires_grad for value in out.metrics.values())


def test_a_weight_of_nothing_leaves_the_term_out() -> None:
    batch = LossInputs(torch.zeros(1, 2), torch.tensor([0]), torch.zeros(1, 2))
    out = combined(batch, LossConfig(kd=0, task=3, cosine=0))
    assert set(out.metrics) == {"loss", "task"}
    assert out.loss.item() == pytest.approx(3 * math.log(2))
    with pytest.raises(AssertionError, match="needs the teacher's side"):
        combined(batch, LossConfig(kd=1, task=0, cosine=0))
