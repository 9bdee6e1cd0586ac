"""Scores with their 95 % intervals, out of what models said and what was right.

entities.py   words with classes: entities found
answers.py    questions: the spans that answer them
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from raydistil.types import Score

Z95 = 1.959964
Floats = NDArray[np.float64]
RESAMPLES, BOOTSTRAP_SEED = 1000, 1979


def wilson(metric: str, hits: NDArray[np.bool_]) -> Score:
    """Share of hits with its 95 % Wilson score interval (Wilson 1927)."""
    n, share = len(hits), float(hits.mean())
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return Score(metric, share, centre - half, centre + half, n)


def bootstrapped(metric: str, count: int, value: Callable[[NDArray[np.int64]], float]) -> Score:
    """`value` of all of `count` rows, with percentiles of it over RESAMPLES samples of them (Efron 1979), the same ones
    for every model."""
    random = np.random.default_rng(BOOTSTRAP_SEED)
    found = [value(random.integers(0, count, count)) for _ in range(RESAMPLES)]
    low, high = np.percentile(found, (2.5, 97.5)).tolist()
    return Score(metric, value(np.arange(count)), low, high, count)


def correlation(first_N: Floats, second_N: Floats) -> float:
    """Pearson's; 0 where all numbers of a side are the same."""
    if np.ptp(first_N) == 0 or np.ptp(second_N) == 0:
        return 0.0
    one_N, other_N = (side_N - side_N.mean() for side_N in (first_N, second_N))
    return float(np.clip(one_N @ other_N / (np.linalg.norm(one_N) * np.linalg.norm(other_N)), -1, 1))


def spearman(truth_N: Floats, said_N: Floats) -> Score:
    """Pearson's correlation of the ranks (Spearman 1904)."""
    return bootstrapped("Spearman", len(truth_N), lambda rows: _rank_correlation(truth_N[rows], said_N[rows]))


def _rank_correlation(first_N: Floats, second_N: Floats) -> float:
    return correlation(ranks(first_N), ranks(second_N))


def ranks(numbers_N: Floats) -> Floats:
    """From 1 on, ascending; equal numbers share the mean of theirs."""
    _, places_N, counts = np.unique(numbers_N, return_inverse=True, return_counts=True)
    means: Floats = np.cumsum(counts) - (counts - 1) / 2
    return means[places_N]
