"""Numbers by hand: the squared error, and the correlations they are scored by."""

import math
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from transformers import BertConfig

from raydistil.config.loss import LossConfig
from raydistil.distiller import Distiller
from raydistil.layers import plan_layers
from raydistil.losses import LossInputs, kd_and_task, weights_at
from raydistil.models import HeadedEncoder
from raydistil.scores import correlation, ranks, spearman
from raydistil.types import TeacherTargets, TokenBatch

pytestmark = pytest.mark.usefixtures("one_thread")

MSE: dict[str, Any] = {"divergence": "mse", "cosine": 0}


def test_the_loss_by_hand() -> None:
    """Of two labelled rows (4 + 102^2) / 2; to the teacher (1 + 0 + 9) / 3. -100 is a number, nan is none."""
    student = torch.tensor([[1.0], [2.0], [2.0]], requires_grad=True)
    taught, labels = torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([3.0, math.nan, -100.0])
    out = kd_and_task(LossInputs(student, labels, taught), LossConfig(**MSE), 3.0, 0.5)
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx({"kd": 10 / 3, "task": 5204})
    assert out.loss.item() == pytest.approx(10 + 2602)
    out.loss.backward()
    assert student.grad is not None
    assert student.grad[:, 0].tolist() == pytest.approx([2 * 1 - 2 / 2, 0, 2 * -3 + 102 / 2])


def test_the_distiller_holds_a_constant_against_labels_and_teacher() -> None:
    """A student that says 2 of every text."""
    model = tiny.model(BertConfig(**tiny.SHAPE, num_labels=1), "regression")
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.fill_(2.0)
    ids_BL, _ = tiny.ids(rows=3)
    lengths, labels = np.array([9, 6, 6], np.int32), np.array([5.0, np.nan, -1.0], np.float32)
    batch = TokenBatch(0, ids_BL.numpy().astype(np.int32), lengths, labels, None, 3, np.arange(3))
    config = LossConfig(kd=2, task=1, **MSE)
    encoder = HeadedEncoder(model, "regression", "float32")
    distiller = Distiller(encoder, config, plan_layers(config, "regression", False, 6, 6), 0, None)
    out = distiller(batch, TeacherTargets({}, torch.tensor([[2.0], [5.0], [-1.0]])), weights_at(config, 0.0))
    assert out.metrics["task"].item() == pytest.approx((9 + 9) / 2)
    assert out.metrics["kd"].item() == pytest.approx((0 + 9 + 9) / 3)
    assert out.loss.item() == pytest.approx(2 * 6 + 9)


# ---- scores


def array(*numbers: float) -> NDArray[np.float64]:
    return np.array(numbers, np.float64)


def test_equal_numbers_share_the_mean_of_their_ranks() -> None:
    assert ranks(array(3, -1, 3, 10, 3, -1)).tolist() == [4, 1.5, 4, 6, 4, 1.5]


def test_correlations_by_hand() -> None:
    """Ranks (1, 2.5, 2.5, 4) and (1, 3, 2, 4): 4.5 / sqrt(4.5 * 5). Pearson of (1, 2, 3) and (1, 3, 2): 1 / 2."""
    assert spearman(array(0, 2, 2, 9), array(-7, 5, 0, 6)).value == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert correlation(array(1, 2, 3), array(1, 3, 2)) == pytest.approx(0.5)
    assert correlation(array(1, 2, 3), array(0.1, 0.1, 0.1)) == 0


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=12))
def test_the_correlations_are_scipys(pairs: list[tuple[int, int]]) -> None:
    first, second = (array(*side) for side in zip(*pairs, strict=True))
    if len(set(first)) > 1 and len(set(second)) > 1:
        assert correlation(first, second) == pytest.approx(stats.pearsonr(first, second)[0], abs=1e-12)
        assert correlation(ranks(first), ranks(second)) == pytest.approx(stats.spearmanr(first, second)[0], abs=1e-12)


def test_the_order_alone_counts_and_the_interval_holds_the_score() -> None:
    random = np.random.default_rng(0)
    truth = random.normal(size=300)
    said = truth + random.normal(size=300)
    score = spearman(truth, said)
    assert spearman(truth, np.exp(said)) == score
    assert (score.metric, score.rows) == ("Spearman", 300)
    assert score.low < score.value < score.high
    # Fisher's z with the standard error of Bonett and Wright (2000)
    half = 1.96 * math.sqrt((1 + score.value**2 / 2) / 297)
    assert math.atanh(score.low) == pytest.approx(math.atanh(score.value) - half, abs=0.03)
    assert math.atanh(score.high) == pytest.approx(math.atanh(score.value) + half, abs=0.03)
