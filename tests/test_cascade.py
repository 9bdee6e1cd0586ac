"""Which texts a cascade leaves to the teacher, in closed form and by the laws it has to keep."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from numpy.typing import NDArray

from raydistil.errors import PlanError
from raydistil.serve.cascade import calibrated, chosen, confidences, in_order

Floats = NDArray[np.float32]


def logits(labels: list[int], margins: list[float], classes: int = 3) -> Floats:
    """Of each row: its label's by as much above the others'."""
    made = np.zeros((len(labels), classes), np.float32)
    made[np.arange(len(labels)), labels] = margins
    return made


TRUTH = np.array([0, 1, 2, 0, 1, 2, 0, 1])
# Least sure of the first three, of which it has two wrong; of the rest one.
STUDENT = logits([1, 2, 2, 0, 1, 2, 0, 0], [0.1, 0.2, 0.3, 1, 2, 3, 4, 5])
TEACHER = logits([0, 1, 2, 0, 1, 2, 1, 1], [9] * 8)  # wrong at the seventh


def test_the_fewest_texts_that_give_the_accuracy_are_the_teachers() -> None:
    for wanted, rows, reached in ((0.5, 0, 5 / 8), (0.7, 1, 6 / 8), (0.8, 2, 7 / 8)):
        cascade = chosen(TRUTH, STUDENT, TEACHER, wanted)
        assert (cascade.share, cascade.accuracy) == (rows / 8, reached)
        below = confidences(STUDENT, cascade.temperature) < cascade.threshold
        assert below.tolist() == [True] * rows + [False] * (8 - rows)


def test_what_no_cascade_reaches_is_refused_with_what_one_does() -> None:
    with pytest.raises(PlanError, match=r"got 0.99: the most is 0.8750, with 25.0% of the texts for the teacher"):
        chosen(TRUTH, STUDENT, TEACHER, 0.99)


def test_a_model_may_have_its_labels_in_another_order() -> None:
    assert in_order(["b", "c", "a"], ["a", "b", "c"]) == [2, 0, 1]
    with pytest.raises(PlanError, match=r"expected a model of the labels \['a', 'b'\] for a cascade, got \['a', 'c'\]"):
        in_order(["c", "a"], ["a", "b"])


def test_all_may_be_the_teachers() -> None:
    always = logits(TRUTH.tolist(), [9.0] * 8)
    wrong = logits([(n + 1) % 3 for n in TRUTH], [1, 2, 3, 4, 5, 6, 7, 8])
    cascade = chosen(TRUTH, wrong, always, 1.0)
    assert cascade.share == cascade.accuracy == 1
    assert (confidences(wrong, cascade.temperature) < cascade.threshold).all()


def test_rows_of_one_confidence_are_on_one_side() -> None:
    student = logits([1, 1, 1, 1], [1, 1, 1, 2])
    truth = np.array([0, 0, 0, 1])
    cascade = chosen(truth, student, logits([0, 0, 0, 1], [9] * 4), 0.5)
    assert (cascade.share, cascade.accuracy) == (0.75, 1.0)


def test_confidence_is_how_often_it_is_right() -> None:
    """Logits three times too large, of classes drawn by their true shares."""
    random = np.random.default_rng(0)
    true_NC = random.normal(0, 1.5, (4000, 4)).astype(np.float32)
    shares_NC = np.exp(true_NC) / np.exp(true_NC).sum(-1, keepdims=True)
    truth_N = (random.random((4000, 1)) > shares_NC.cumsum(-1)).sum(-1).clip(max=3)
    temperature = calibrated(truth_N, 3 * true_NC)
    assert temperature == pytest.approx(3, rel=0.05)
    right = (true_NC.argmax(-1) == truth_N).mean()
    assert confidences(3 * true_NC, temperature).mean() == pytest.approx(right, abs=0.02)


@given(some.integers(0, 2**32 - 1), some.floats(0, 1))
def test_a_cascade_does_what_it_says(seed: int, wanted: float) -> None:
    random = np.random.default_rng(seed)
    truth_N = random.integers(0, 3, 40)
    student, teacher = (
        (random.normal(0, 1, (40, 3)) + skill * np.eye(3)[truth_N]).astype(np.float32) for skill in (1, 2)
    )
    try:
        cascade = chosen(truth_N, student, teacher, wanted)
    except PlanError:
        assert (student.argmax(-1) == truth_N).mean() < wanted > (teacher.argmax(-1) == truth_N).mean()
        return
    below = confidences(student, cascade.temperature) < cascade.threshold
    right = np.where(below, teacher.argmax(-1), student.argmax(-1)) == truth_N
    assert below.mean() == pytest.approx(cascade.share)
    assert right.mean() == pytest.approx(cascade.accuracy) and cascade.accuracy >= wanted
