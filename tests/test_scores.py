"""Scores by hand: entities of words, answers of spans, and their intervals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistil.scores import bootstrapped
from raydistil.scores.answers import LONGEST, Found, answer_scores, best_span, normalized, overlap_f1
from raydistil.scores.entities import entities, entity_f1, marks_entities

TAGS = ("O", "B-a", "I-a", "B-b", "I-b")


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-a I-a O", {(1, 3, "a")}),
        ("B-a B-a I-a", {(0, 1, "a"), (1, 3, "a")}),
        ("I-a I-a I-b", {(0, 2, "a"), (2, 3, "b")}),
        ("B-a I-b", {(0, 1, "a"), (1, 2, "b")}),
        ("O O", set()),
    ],
)
def test_entities(tags: str, expected: set[tuple[int, int, str]]) -> None:
    assert entities(tags.split()) == expected


@given(st.lists(st.sampled_from(TAGS), max_size=20))
def test_entities_are_all_words_that_have_a_class(tags: list[str]) -> None:
    held = [place for start, end, _ in entities(tags) for place in range(start, end)]
    assert sorted(held) == [place for place, tag in enumerate(tags) if tag != "O"]
    assert all({tag[2:] for tag in tags[start:end]} == {kind} for start, end, kind in entities(tags))


def test_entity_f1_counts_whole_entities() -> None:
    truth, said = [["B-a", "I-a", "O"], ["B-b"]], [["B-a", "O", "O"], ["B-b"]]
    score = entity_f1(truth, said)
    assert (score.value, score.rows) == (2 * 1 / (2 + 2), 2)
    assert score.low == 0 and score.high == 1
    assert entity_f1([["O"]], [["O"]]).value == 1
    assert entity_f1([["O"]], [["B-a"]]).value == 0


@pytest.mark.parametrize(
    ("labels", "expected"), [(TAGS, True), (("O", "B-a"), True), (("NOUN", "VERB"), False), (("O", "I-a"), False)]
)
def test_classes_that_mark_entities(labels: tuple[str, ...], expected: bool) -> None:
    assert marks_entities(labels) == expected


def test_answers_are_compared_as_squad_does() -> None:
    assert normalized("The  Eiffel-Tower, an icon.") == ["eiffeltower", "icon"]
    assert overlap_f1("the cat sat", "a cat sat down") == pytest.approx(2 * 2 / 5)
    assert (overlap_f1("", ""), overlap_f1("the", ""), overlap_f1("x", "")) == (1, 1, 0)
    score, exact = answer_scores(["the cat", "dog", "x"], [["a dog", "cat"], ["dogs"], []])
    assert score.value == pytest.approx((1 + 0 + 0) / 3) and exact == pytest.approx(1 / 3)


@given(st.integers(2, 40), st.integers(0, 10), st.integers(0, 99))
def test_the_best_span_is_the_best_of_all(length: int, before: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    starts, ends = random.normal(size=(2, length)).astype(np.float32)
    chars = np.array([(-1, -1) if n < before else (3 * n, 3 * n + 2) for n in range(length)], np.int32)
    found = best_span(starts, ends, chars)
    spans = [(i, j) for i in range(before, length) for j in range(i, min(length, i + LONGEST))]
    if not spans:
        assert found.score == -np.inf
        return
    i, j = max(spans, key=lambda span: starts[span[0]] + ends[span[1]])
    assert (found.start, found.end) == (3 * i, 3 * j + 2)


def test_no_answer_must_be_likelier_in_every_window() -> None:
    chars = np.array([(-1, -1), (0, 1), (1, 2)], np.int32)
    empty, full = np.array([5.0, 0, 0], np.float32), np.array([-5.0, 3, 0], np.float32)
    both = Found().after(empty, empty, chars).after(full, full, chars)
    assert both.answer("ab", may_lack=True) == "a"
    alone = Found().after(empty, empty, chars)
    assert (alone.answer("ab", may_lack=True), alone.answer("ab", may_lack=False)) == ("", "a")


def test_the_interval_holds_the_value_and_shrinks() -> None:
    random = np.random.default_rng(0)
    widths = []
    for size in (20, 2000):
        values = random.random(size)
        score = bootstrapped("mean", size, lambda rows, values=values: float(values[rows].mean()))
        assert score.low <= score.value <= score.high
        widths.append(score.high - score.low)
    assert widths[1] == pytest.approx(widths[0] / 10, rel=0.5)
