"""Which of a language model's tokens are compared."""

from itertools import product

import numpy as np
import pytest

from raydistil.config.loss import LossConfig
from raydistil.places import compared_places, compared_share
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
