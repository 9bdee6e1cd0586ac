"""Masked-LM corruption: pure functions of a key, with the shares that were promised."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from raydistil.config import MaskingConfig
from raydistil.manifest import keyed
from raydistil.masking import Vocabulary, mask_tokens, row_keys, uniforms
from raydistil.types import IGNORE

MASK = 4
SPECIAL = (0, 1, 2, 3, 4)
VOCABULARY = Vocabulary(1000, MASK, SPECIAL, None)
UNIFORM = MaskingConfig()
FREQUENCY = MaskingConfig(kind="frequency")
Int32s = NDArray[np.int32]


def texts(rows: int, length: int, seed: int = 0) -> tuple[Int32s, Int32s]:
    """(ids, lengths) of `[CLS] words [SEP] padding`, of every length from half to all of `length`."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(5, VOCABULARY.size, (rows, length)).astype(np.int32)
    lengths = draw.integers(length // 2, length + 1, rows).astype(np.int32)
    ids[:, 0] = 2
    ids[np.arange(rows), lengths - 1] = 3
    ids[np.arange(length)[None, :] >= lengths[:, None]] = 7  # padding that only the length tells from a word
    return ids, lengths


def vocabulary(counts: NDArray[np.int64]) -> Vocabulary:
    return Vocabulary(len(counts), MASK, SPECIAL, counts)


def within(hits: int, trials: int, share: float) -> bool:
    """Whether `hits` is within five standard deviations of a binomial's mean."""
    return abs(hits - trials * share) < 5 * math.sqrt(trials * share * (1 - share))


def masked(
    kind: MaskingConfig, ids: Int32s, lengths: Int32s, seed: int = 0, index: int = 0, first: int = 0
) -> tuple[Int32s, Int32s]:
    counts = np.arange(1000)
    return mask_tokens(ids, lengths, kind, vocabulary(counts), seed, index, np.arange(first, first + len(ids)))


@pytest.mark.parametrize("kind", [UNIFORM, FREQUENCY], ids=lambda kind: kind.kind)
@given(st.integers(0, 2**31 - 1), st.integers(0, 2**40), st.integers(0, 2**40))
def test_the_same_keys_give_the_same_masks(kind: MaskingConfig, seed: int, index: int, first: int) -> None:
    ids, lengths = texts(4, 40)
    once, again = (masked(kind, ids.copy(), lengths.copy(), seed, index, first) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(part.dtype == np.int32 for part in once)
    assert np.array_equal(ids, texts(4, 40)[0])


def test_a_row_is_masked_alike_whatever_stands_beside_it() -> None:
    ids, lengths = texts(6, 40)
    together = mask_tokens(ids, lengths, UNIFORM, VOCABULARY, 5, 0, np.arange(6))
    for row in range(6):
        wider = np.pad(ids[row : row + 1], ((0, 0), (0, 8)))
        alone = mask_tokens(wider, lengths[row : row + 1], UNIFORM, VOCABULARY, 5, 99, np.array([row]))
        for whole, part in zip(together, alone, strict=True):
            assert np.array_equal(whole[row], part[0, :40])


def test_seeds_positions_and_micro_batches_differ() -> None:
    ids, lengths = texts(8, 60)
    for kind in (UNIFORM, FREQUENCY):
        base = masked(kind, ids, lengths)[1]
        assert not np.array_equal(base, masked(kind, ids, lengths, seed=1)[1])
    assert not np.array_equal(masked(UNIFORM, ids, lengths)[1], masked(UNIFORM, ids, lengths, first=8)[1])
    assert not np.array_equal(masked(FREQUENCY, ids, lengths)[1], masked(FREQUENCY, ids, lengths, index=1)[1])


def test_the_shares_of_bert() -> None:
    ids, lengths = texts(2000, 130)
    corrupted, labels = mask_tokens(ids, lengths, UNIFORM, VOCABULARY, 0, 0, np.arange(2000))
    words = int((lengths - 2).sum())
    chosen = labels != IGNORE
    count = int(chosen.sum())
    assert within(count, words, 0.15)
    same_by_chance = 0.1 / VOCABULARY.size
    assert within(int((corrupted[chosen] == MASK).sum()), count, 0.8 + same_by_chance)
    assert within(int((corrupted[chosen] == ids[chosen]).sum()), count, 0.1 + same_by_chance)
    random = corrupted[chosen & (corrupted != MASK) & (corrupted != ids)]
    assert within(int((random < VOCABULARY.size // 2).sum()), len(random), 0.5)
    assert random.min() >= 0
    assert random.max() < VOCABULARY.size


@pytest.mark.parametrize("kind", [UNIFORM, FREQUENCY], ids=lambda kind: kind.kind)
def test_specials_and_padding_are_never_chosen(kind: MaskingConfig) -> None:
    ids, lengths = texts(400, 60)
    ids[:, 7:12] = SPECIAL
    corrupted, labels = masked(kind.model_copy(update={"share": 0.9}), ids, lengths)
    chosen = labels != IGNORE
    real = np.arange(60)[None, :] < lengths[:, None]
    assert not (chosen & ~real).any()
    assert not (chosen & (ids < 5)).any()
    assert np.array_equal(labels[chosen], ids[chosen])
    assert np.array_equal(corrupted[~chosen], ids[~chosen])
    assert chosen.any()


@pytest.mark.parametrize("share", [0.07, 0.15, 0.5])
@given(st.integers(0, 1000), st.integers(1, 9))
def test_frequency_draws_an_exact_number(share: float, seed: int, rows: int) -> None:
    ids, lengths = texts(rows, 24, seed)
    kind = MaskingConfig(kind="frequency", share=share)
    labels = masked(kind, ids, lengths, seed)[1]
    assert (labels != IGNORE).sum() == math.ceil(share * int(lengths.sum()))


def test_frequency_draws_no_more_than_there_are_words() -> None:
    ids = np.array([[2, 9, 3, 0, 0], [2, 3, 3, 0, 0]], np.int32)
    lengths = np.array([3, 3], np.int32)
    labels = masked(MaskingConfig(kind="frequency", share=0.9), ids, lengths)[1]
    assert labels.tolist() == [[IGNORE, 9, IGNORE, IGNORE, IGNORE], [IGNORE] * 5]
    empty = np.array([[2, 3]], np.int32)
    assert (masked(FREQUENCY, empty, np.array([2], np.int32))[1] == IGNORE).all()


def test_frequency_prefers_rare_tokens_as_their_weights_say() -> None:
    """One draw among a rare and a common token: p(rare) = w / (w + 1) with w = (1000 / 10)^0.7."""
    counts = np.ones(1000, np.int64)
    counts[10], counts[11] = 10, 1000
    ids, lengths, trials = np.array([[10, 11]], np.int32), np.array([2], np.int32), 4000
    kind = MaskingConfig(kind="frequency", share=0.4)
    rare = 0
    for index in range(trials):
        labels = mask_tokens(ids, lengths, kind, vocabulary(counts), 0, index, np.array([index]))[1]
        assert (labels != IGNORE).sum() == 1
        rare += int(labels[0, 0] == 10)
    weight = 100**0.7
    assert within(rare, trials, weight / (weight + 1))


def test_without_smoothing_every_token_is_alike() -> None:
    counts = np.ones(1000, np.int64)
    counts[10] = 10**6
    ids, trials = np.array([[10, 11, 12, 13]], np.int32), 2000
    kind = MaskingConfig(kind="frequency", share=0.25, smoothing=0)
    hits = sum(
        mask_tokens(ids, np.array([4], np.int32), kind, vocabulary(counts), 0, n, np.array([n]))[1][0, 0] == 10
        for n in range(trials)
    )
    assert within(int(hits), trials, 0.25)


@pytest.mark.parametrize("stream", [1, 2, 3])
def test_uniforms_are_uniform_and_unrelated(stream: int) -> None:
    numbers = uniforms(row_keys(0, np.arange(2000)), 100, stream)
    other = uniforms(row_keys(0, np.arange(2000)), 100, stream % 3 + 1)
    n = numbers.size
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, 20, (0, 1))[0]
    assert all(within(int(count), n, 0.05) for count in counts)
    for a, b in ((numbers, other), (numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / math.sqrt(a.size)


def test_the_numbers_never_change() -> None:
    """A run goes on with the masks it began with, also with a later version."""
    expected = [0.70059283, 0.97667517, 0.49173349, 0.66626444]
    assert uniforms(np.array([keyed(1)]), 4, 3)[0] == pytest.approx(expected, abs=1e-8)
