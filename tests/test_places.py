"""Which of a language model's tokens are compared."""

from itertools import product

import numpy as np
import pytest

from raydistil.config.loss import LossConfig
from raydistil.places import EVEN, compared_places, compared_share, evened
from raydistil.types import IGNORE, TokenBatch

MASKED = 0.15
CASES = [(kd, task, positions) for kd, task, positions in product((0.0, 1.0), (0.0, 1.0), ("all", "masked", "sample"))]


@pytest.mark.parametrize(("kd", "task", "positions"), CASES)
def test_the_share_that_is_expected_is_the_share_that_is_found(kd: float, task: float, positions: str) -> None:
    generator = np.random.default_rng(0)
    labels_BL = np.where(generator.random((400, 64)) < MASKED, 1, IGNORE).astype(np.int32)
    lengths_B, visits_B = np.full(400, 64, np.int32), np.arange(400, dtype=np.int64)
    batch = TokenBatch(0, np.ones_like(labels_BL), lengths_B, None, labels_BL, 400, visits_B)
    loss = LossConfig.model_construct(**{**dict(LossConfig()), "kd": kd, "task": task, "kd_positions": positions})
    found = compared_places(batch, loss, seed=0).at_T.mean()
    assert compared_share(loss, MASKED) == pytest.approx(found, abs=0.01)


@pytest.mark.parametrize("count", [0, 1, EVEN - 1, EVEN, EVEN + 1])
def test_places_are_filled_up_with_the_first(count: int) -> None:
    at_N = np.arange(count) * 3 + 7
    at_M = evened(at_N)
    assert len(at_M) == -(-count // EVEN) * EVEN
    assert np.array_equal(at_M[:count], at_N)
    assert set(at_M[count:].tolist()) <= {7}
