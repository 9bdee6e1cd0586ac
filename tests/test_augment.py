"""Variants of labelled texts: what stays, what changes, and that all of it is a function of (seed, visit)."""

from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistil.augment import Words, augment
from raydistil.config.targets import AugmentConfig
from raydistil.types import IGNORE, TokenBatch

PAD, CLS, SEP, MASK = 0, 1, 2, 3
COUNTS = np.array([9, 9, 9, 9, *range(1, 97)], np.int64)
WORDS = Words(PAD, MASK, COUNTS, (PAD, CLS, SEP, MASK))
NOTHING: dict[str, Any] = {"keep": 0, "join": 0, "cut": 0, "mask": 0, "replace": 0, "drop": 0}


def batch(lengths: list[int], width: int = 24, visit: int = 0) -> TokenBatch:
    """Row b, visit `visit` + b, holds the tokens 4 + 20 b, 5 + 20 b ..., so that every token says where it is from."""
    ids = np.full((len(lengths), width), PAD, np.int32)
    for row, length in enumerate(lengths):
        ids[row, :length] = [CLS, *range(4 + 20 * row, 2 + 20 * row + length), SEP]
    labels = np.arange(len(lengths), dtype=np.int32)
    visits = visit + np.arange(len(lengths))
    return TokenBatch(0, ids, np.array(lengths, np.int32), labels, None, len(lengths), visits)


def changed(given_batch: TokenBatch, config: AugmentConfig, seed: int, words: Words = WORDS) -> TokenBatch:
    """Each row's partner is the row after it."""
    names = ("input_ids_BL", "lengths_B", "contexts_B")
    columns = {name: column for name in names if (column := getattr(given_batch, name)) is not None}
    partner = replace(given_batch, **{name: np.roll(column, -1, axis=0) for name, column in columns.items()})
    return augment(given_batch, partner, config, words, seed)


def bodies(made: TokenBatch) -> list[list[int]]:
    return [row[1 : length - 1].tolist() for row, length in zip(made.input_ids_BL, made.lengths_B, strict=True)]


def with_only(given_batch: TokenBatch, seed: int = 0, **keys: Any) -> TokenBatch:
    return changed(given_batch, AugmentConfig(**NOTHING | keys), seed)


@given(st.lists(st.integers(2, 20), min_size=1, max_size=4), st.integers(0, 99), st.integers(0, 9))
def test_rows_stay_framed_and_within_their_length(lengths: list[int], seed: int, visit: int) -> None:
    given_batch = batch(lengths, width=20, visit=visit)
    made = changed(given_batch, AugmentConfig(keep=0.2, mask=0.3, replace=0.2, drop=0.3), seed)
    assert made.input_ids_BL.shape == given_batch.input_ids_BL.shape
    assert made.input_ids_BL.dtype == made.lengths_B.dtype == np.int32
    for row, length in zip(made.input_ids_BL, made.lengths_B, strict=True):
        assert row[0] == CLS
        assert row[length - 1] == SEP
        assert (row[length:] == PAD).all()
        assert not np.isin(row[1 : length - 1], (PAD, CLS, SEP)).any()
    assert (made.index, made.num_rows) == (given_batch.index, given_batch.num_rows)


@given(st.integers(0, 99), st.integers(0, 99))
def test_a_changed_row_loses_its_label_and_a_kept_one_does_not(seed: int, visit: int) -> None:
    given_batch = batch([9, 12, 20, 6], visit=visit)
    made = changed(given_batch, AugmentConfig(), seed)
    for row, (old, new) in enumerate(zip(bodies(given_batch), bodies(made), strict=True)):
        assert made.labels_B is not None
        assert made.labels_B[row] == (row if old == new else IGNORE)


def test_the_same_seed_and_visit_give_the_same_variants() -> None:
    first, again = (with_only(batch([20, 20]), seed=1, join=1) for _ in range(2))
    assert np.array_equal(first.input_ids_BL, again.input_ids_BL)
    for other in (with_only(batch([20, 20]), seed=2, join=1), with_only(batch([20, 20], visit=5), seed=1, join=1)):
        assert not np.array_equal(first.input_ids_BL, other.input_ids_BL)


def test_without_any_change_all_stays() -> None:
    given_batch = batch([9, 20])
    made = with_only(given_batch)
    assert np.array_equal(made.input_ids_BL, given_batch.input_ids_BL)
    assert np.array_equal(made.labels_B, given_batch.labels_B)


@given(st.integers(0, 99))
def test_a_cut_text_is_a_part_of_itself(seed: int) -> None:
    given_batch = batch([20, 12, 3])
    for old, new in zip(bodies(given_batch), bodies(with_only(given_batch, seed, cut=1)), strict=True):
        assert 1 <= len(new) <= max(1, round(0.9 * len(old)))
        assert new == list(range(new[0], new[0] + len(new)))
        assert set(new) <= set(old)


@given(st.integers(0, 99))
def test_joined_texts_are_parts_of_two_in_a_row(seed: int) -> None:
    given_batch = batch([20, 20, 20], width=22)
    for row, new in enumerate(bodies(with_only(given_batch, seed, join=1))):
        sources = [(token - 4) // 20 for token in new]
        turn = next((n for n, source in enumerate(sources) if source != row), len(new))
        assert turn >= 4  # a quarter of 18 or more of its own comes first
        assert len(set(sources[turn:])) <= 1
        if turn < len(new):
            assert all(b == a + 1 for part in (new[:turn], new[turn:]) for a, b in pairwise(part))


def share_of(made: TokenBatch, given_batch: TokenBatch, of: int | None) -> float:
    pairs = zip(chain(*bodies(given_batch)), chain(*bodies(made)), strict=True)
    changed = [new != old if of is None else new == of for old, new in pairs]
    return sum(changed) / len(changed)


def test_tokens_are_masked_and_replaced_in_the_asked_for_share() -> None:
    given_batch = batch([1000] * 4, width=1000)
    masked, replaced = with_only(given_batch, mask=0.3), with_only(given_batch, replace=0.3)
    assert share_of(masked, given_batch, MASK) == pytest.approx(0.3, abs=0.03)
    assert share_of(replaced, given_batch, None) == pytest.approx(0.3, abs=0.03)


def test_dropped_tokens_are_gone_in_order() -> None:
    given_batch = batch([1000] * 2, width=1000)
    for old, new in zip(bodies(given_batch), bodies(with_only(given_batch, drop=0.4)), strict=True):
        assert len(new) / len(old) == pytest.approx(0.6, abs=0.06)
        assert new == sorted(new)
        assert set(new) < set(old)


def test_others_come_as_often_as_they_occur_in_the_corpus() -> None:
    """Token 4 + n occurs 1 + n times of 4,656; the special ones are never drawn."""
    drawn = Counter(WORDS.drawer()(np.random.default_rng(0), 200_000).tolist())
    assert min(drawn) >= 4
    assert drawn[99] / 200_000 == pytest.approx(96 / 4656, rel=0.05)
    assert drawn[50] / 200_000 == pytest.approx(47 / 4656, rel=0.1)


def test_the_share_of_rows_that_are_kept() -> None:
    given_batch = batch([12] * 400, width=12)
    made = with_only(given_batch, keep=0.25, mask=1)
    assert made.labels_B is not None
    assert (made.labels_B != IGNORE).mean() == pytest.approx(0.25, abs=0.06)


def test_a_row_is_changed_alike_whoever_stands_beside_it() -> None:
    """Its partner given, a variant hangs on (seed, visit) alone."""
    config = AugmentConfig(keep=0.1)
    whole, rows = batch([20, 12, 9, 20], visit=40), slice(2, 3)
    ids, lengths, visits = whole.input_ids_BL[rows], whole.lengths_B[rows], whole.visits_B[rows]
    alone = TokenBatch(7, ids, lengths, np.zeros(1, np.int32), None, 1, visits)
    partner = replace(alone, input_ids_BL=whole.input_ids_BL[3:], lengths_B=whole.lengths_B[3:])
    made = augment(alone, partner, config, WORDS, seed=5)
    assert np.array_equal(made.input_ids_BL, changed(whole, config, 5).input_ids_BL[rows])
