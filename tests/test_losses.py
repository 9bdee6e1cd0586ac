"""Soft and hard labels in one pass, and the weighted sum of all terms."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from watch import Widest

from raydistil.config.loss import LossConfig
from raydistil.layers import plan_layers
from raydistil.losses import LossInputs, LossOutputs, Projection, combined, kd_and_task, labels, weights_at
from raydistil.types import IGNORE

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = st.integers(0, 10_000)
N, D, V = 11, 4, 7


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks smaller than the inputs, and none that divides them."""
    monkeypatch.setattr(labels, "ROWS_PER_PRODUCT", 5)
    monkeypatch.setattr(labels, "ROWS_PER_PASS", 2)


def projections(seed: int = 0) -> tuple[Projection, Projection, Tensor]:
    """(student's, teacher's, labels); the teacher is wider, two places have no label."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    labels_N = torch.randint(0, V, (N,), generator=generator)
    labels_N[[2, 9]] = IGNORE
    student = Projection(draw(N, D).requires_grad_(), draw(V, D).requires_grad_(), draw(V).requires_grad_())
    return student, Projection(draw(N, 2 * D), draw(V, 2 * D), draw(V)), labels_N


def logits_of(head: Projection) -> Tensor:
    return F.linear(head.features_ND, head.weight_CD, head.bias_C)


def plain(student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor, kd_N: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """(T^2 KL, CE) as one writes them in PyTorch."""
    log_q, p = F.log_softmax(student_NV[kd_N] / t, -1), F.softmax(teacher_NV[kd_N] / t, -1)
    return F.kl_div(log_q, p, reduction="batchmean") * t**2, F.cross_entropy(student_NV, labels_N)


# ---- the vocabulary in blocks


@pytest.mark.parametrize("kd_everywhere", [True, False])
def test_a_projection_gives_what_its_logits_give(kd_everywhere: bool) -> None:
    student, teacher, labels_N = projections()
    kd_N = torch.ones(N, dtype=torch.bool)
    kd_N[[0, 4, 5]] = kd_everywhere
    out = kd_and_task(LossInputs(student, labels_N, teacher, kd_N), LossConfig(temperature=3), 5.0, 2.0)
    kd, task = plain(logits_of(student), logits_of(teacher), labels_N, kd_N, 3.0)
    torch.testing.assert_close(out.loss, 5 * kd + 2 * task)
    torch.testing.assert_close([out.metrics["kd"], out.metrics["task"]], [kd.detach(), task.detach()])
    leaves = [student.features_ND, student.weight_CD, student.bias_C]
    got, wanted = torch.autograd.grad(out.loss, leaves), torch.autograd.grad(5 * kd + 2 * task, leaves)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("filler", [1, 4, 9])
def test_rows_beyond_the_places_count_for_nothing(filler: int) -> None:
    """They may fill a block, or be all of one."""
    student, teacher, labels_N = projections()

    def filled(head: Projection) -> Projection:
        return replace(head, features_ND=torch.cat([head.features_ND, 9 * head.features_ND[:filler]]))

    leaves, found = [student.features_ND, student.weight_CD, student.bias_C], []
    for sides in ((student, teacher), (filled(student), filled(teacher))):
        out = kd_and_task(LossInputs(sides[0], labels_N, sides[1]), LossConfig(), 5.0, 2.0)
        found.append((out.loss, out.metrics, torch.autograd.grad(out.loss, leaves)))
    torch.testing.assert_close(found[0], found[1])


def test_a_frozen_vocabulary_saves_its_gradient_and_changes_no_other() -> None:
    student, teacher, labels_N = projections()
    frozen = replace(student, weight_CD=student.weight_CD.detach())
    leaves = [student.features_ND, student.bias_C]
    found = []
    for side in (student, frozen):
        with Products() as counted:
            loss = kd_and_task(LossInputs(side, labels_N, teacher), LossConfig(), 5.0, 2.0).loss
        found.append((loss, torch.autograd.grad(loss, leaves), len(counted.dtypes)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)
    assert (found[0][2], found[1][2]) == (12, 9)  # of three blocks: both heads, and the gradients


def test_autocast_around_the_losses_changes_nothing() -> None:
    student, teacher = torch.randn(2, 8, V)
    inputs = LossInputs(student, torch.arange(8) % V, teacher)
    config = LossConfig(divergence="reverse_kl")
    expected = kd_and_task(inputs, config, 1.5, 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        found = kd_and_task(inputs, config, 1.5, 0.7)
    assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "mse"])
def test_gradcheck_of_the_chunked_function(kind: str) -> None:
    student, teacher, labels_N = projections()
    config = LossConfig(divergence=kind, label_smoothing=0.1)

    def of(features_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
        inputs = LossInputs(Projection(features_ND, weight_VD, bias_V), labels_N, teacher)
        return kd_and_task(inputs, config, 1.5, 0.7).loss

    assert torch.autograd.gradcheck(of, (student.features_ND, student.weight_CD, student.bias_C))


def test_gradcheck_without_bias_and_with_logits_for_a_teacher() -> None:
    student, teacher, labels_N = projections()
    taught_NV = logits_of(teacher)

    def of(features_ND: Tensor, weight_VD: Tensor) -> Tensor:
        inputs = LossInputs(Projection(features_ND, weight_VD, None), labels_N, taught_NV)
        return kd_and_task(inputs, LossConfig(), 1.5, 0.7).loss

    assert torch.autograd.gradcheck(of, (student.features_ND, student.weight_CD))


def test_gradcheck_of_logits_that_are_there() -> None:
    student, teacher, labels_N = projections()
    taught_NV = logits_of(teacher)
    of = lambda s: kd_and_task(LossInputs(s, labels_N, taught_NV), LossConfig(), 1.5, 0.7).loss  # noqa: E731
    assert torch.autograd.gradcheck(of, (logits_of(student).detach().requires_grad_(),))


def test_the_logits_never_exist_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "ROWS_PER_PRODUCT", 3)
    student, teacher, labels_N = projections()
    leaves = [leaf.detach().float().requires_grad_() for leaf in (student.features_ND, student.weight_CD)]
    single = Projection(leaves[0], leaves[1], None)
    wide = Projection(teacher.features_ND.float(), teacher.weight_CD.float(), None)
    half_NV = logits_of(wide).half()
    with Widest(V) as chunked:
        kd_and_task(LossInputs(single, labels_N, wide), LossConfig(), 1.0, 1.0).loss.backward()
        kd_and_task(LossInputs(single, labels_N, half_NV), LossConfig(), 1.0, 1.0).loss.backward()
    with Widest(V) as whole:
        sum(plain(logits_of(single), logits_of(wide), labels_N, labels_N != IGNORE, 1.0)).backward()
    assert chunked.rows == 3
    assert whole.rows == N


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the dtypes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "mm" in func.__name__:
            self.dtypes.append(out.dtype)
        return out


def test_bfloat16_products_keep_the_losses_in_float32() -> None:
    student, teacher, labels_N = projections()
    half = torch.bfloat16
    single, wide = (
        Projection(*(part.detach().float() for part in (head.features_ND, head.weight_CD, head.bias_C)), half)
        for head in (student, teacher)
    )
    with Products() as seen:
        out = kd_and_task(LossInputs(single, labels_N, wide), LossConfig(), 5.0, 2.0)
    assert set(seen.dtypes) == {half}
    kd, task = plain(logits_of(single), logits_of(wide), labels_N, torch.ones(N, dtype=torch.bool), 2.0)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, 5 * kd + 2 * task, rtol=0.02, atol=0)
    assert out.loss.item() == pytest.approx(5 * out.metrics["kd"].item() + 2 * out.metrics["task"].item(), rel=1e-6)


# ---- labels


def test_task_is_the_mean_over_the_labelled_places() -> None:
    """-ln(3/4) where the label is the likelier class, -ln(1/4) where not, and nothing where there is no label."""
    student = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0], [9.0, -9.0]])
    out = kd_and_task(LossInputs(student, torch.tensor([0, 1, IGNORE])), LossConfig(), 0.0, 1.0)
    assert out.loss.item() == pytest.approx((-math.log(0.75) - math.log(0.25)) / 2, abs=1e-6)
    assert set(out.metrics) == {"task"}


def test_numbers_for_labels_make_it_a_regression() -> None:
    student = torch.tensor([[3.0], [1.0]], requires_grad=True)
    out = kd_and_task(LossInputs(student, torch.tensor([1.0, 2.0])), LossConfig(), 0.0, 1.0)
    out.loss.backward()
    assert out.loss.item() == 2.5
    assert student.grad is not None
    assert student.grad.tolist() == [[2.0], [-1.0]]


def test_where_no_place_has_a_label_nothing_is_learned() -> None:
    student = torch.randn(3, 4, requires_grad=True)
    out = kd_and_task(LossInputs(student, torch.full((3,), IGNORE)), LossConfig(), 0.0, 1.0)
    out.loss.backward()
    assert out.loss.item() == 0
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros(3, 4))


@pytest.mark.parametrize("chunked", [True, False])
def test_no_places_give_no_loss_and_no_nan(chunked: bool) -> None:
    nothing, weight = torch.zeros(0, D, requires_grad=True), torch.ones(V, D, requires_grad=True)
    student = Projection(nothing, weight, None) if chunked else nothing @ weight.T
    out = kd_and_task(LossInputs(student, torch.zeros(0, dtype=torch.int64), torch.zeros(0, V)), LossConfig(), 1.0, 1.0)
    out.loss.backward()
    assert {name: value.item() for name, value in out.metrics.items()} == {"kd": 0, "task": 0}
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(V, D))


# ---- the sum of terms


def batch(seed: int) -> LossInputs:
    """Two rows of three tokens, a classification; states of two layers on both sides."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher, one, two, three, four = torch.randn(6, 6, 5, generator=generator, dtype=torch.float64)
    mask_BL = torch.ones(2, 3, dtype=torch.bool)
    states = {1: one.requires_grad_(), 2: two.requires_grad_()}
    return LossInputs(
        student[:2].requires_grad_(), torch.tensor([0, 3]), teacher[:2], None, states, {1: three, 2: four},
        mask_BL=mask_BL,
    )  # fmt: skip


def run(inputs: LossInputs, config: LossConfig, progress: float = 0.0) -> LossOutputs:
    layers = plan_layers(config, "classification", False, 2, 2)
    return combined(inputs, config, layers, weights_at(config, progress))


@given(SEEDS, st.floats(0.1, 9), st.floats(0.1, 9), st.floats(0.1, 9), st.floats(0.1, 9))
def test_the_sum_is_weighted_and_the_metrics_are_not(seed: int, a: float, b: float, c: float, d: float) -> None:
    config = LossConfig(kd=a, task=b, cosine=c, hidden={"weight": d, "layers": ((1, 1), (2, 2))})
    out = run(batch(seed), config)
    alone = {
        "kd": {"kd": 1},
        "task": {"task": 1},
        "cosine": {"cosine": 1},
        "hidden": {"hidden": {"layers": ((1, 1), (2, 2))}},
    }
    for name, keys in alone.items():
        single = run(batch(seed), LossConfig(**({"kd": 0, "task": 0, "cosine": 0} | keys)))
        assert single.loss.item() == pytest.approx(out.metrics[name].item(), rel=1e-12)
    parts = zip((a, b, c, d), alone, strict=True)
    assert out.loss.item() == pytest.approx(sum(weight * out.metrics[name].item() for weight, name in parts))
    assert out.metrics["loss"].item() == out.loss.item()
    assert out.loss.requires_grad
    assert not any(value.requires_grad for value in out.metrics.values())


def test_cosine_by_hand() -> None:
    """Same direction 0, right angle 1, opposite 2, 60 degrees 1/2: the mean is 3.5 / 4."""
    student = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [1.0, 0.0]])
    teacher = torch.tensor([[5.0, 0.0], [3.0, 0.0], [-1.0, -1.0], [0.5, math.sqrt(3) / 2]])
    inputs = LossInputs(student, torch.zeros(4, dtype=torch.int64), None, None, {2: student}, {2: teacher})
    assert run(inputs, LossConfig(kd=0, task=0)).loss.item() == pytest.approx(3.5 / 4, abs=1e-6)


def test_a_term_without_weight_is_left_out() -> None:
    inputs = LossInputs(torch.zeros(1, 2), torch.tensor([0]))
    out = run(inputs, LossConfig(kd=0, task=3, cosine=0))
    assert set(out.metrics) == {"loss", "task"}
    assert out.loss.item() == pytest.approx(3 * math.log(2))
    with pytest.raises(AssertionError, match="need the teacher's side"):
        run(inputs, LossConfig(kd=1, task=0, cosine=0))


# ---- schedules


def test_a_linear_schedule_goes_from_one_end_to_the_other() -> None:
    config = LossConfig(kd=4, schedule={"kd": {"linear": (1.0, 0.5)}})
    assert [weights_at(config, share)["kd"] for share in (0, 0.5, 1)] == [4, 3, 2]
    assert weights_at(config, 0.5)["task"] == config.task


def test_where_every_weight_is_down_to_nothing_nothing_is_learned() -> None:
    config = LossConfig(kd=0, task=2, cosine=0, schedule={"task": {"linear": (1.0, 0.0)}})
    inputs = batch(0)
    out = run(inputs, config, progress=1.0)
    out.loss.backward()
    assert set(out.metrics) == {"loss"}
    assert isinstance(inputs.student_logits, Tensor)
    assert inputs.student_logits.grad is not None
    assert (out.loss.item(), inputs.student_logits.grad.abs().max().item()) == (0, 0)


def test_steps_hold_from_their_share_on() -> None:
    config = LossConfig(task=2, schedule={"task": {"steps": ((0.0, 0.0), (0.25, 1.0), (0.5, 3.0))}})
    assert [weights_at(config, share)["task"] for share in (0, 0.24, 0.25, 0.5, 1)] == [0, 0, 2, 6, 6]
    assert weights_at(config, 0.9)["kd"] == config.kd
