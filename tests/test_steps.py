"""Who trains on what, whatever the number of workers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistil import steps as module
from raydistil.steps import FILLER, Steps

STEPS = st.builds(
    lambda per_step, first, more, workers: Steps(per_step, first, first + more, workers),
    st.integers(1, 9), st.integers(0, 5), st.integers(0, 12), st.integers(1, 5),
)  # fmt: skip


def shares(steps: Steps) -> list[list[int]]:
    """What each worker is given, in its order."""
    turns = np.arange(steps.num_rows // steps.workers)
    return [steps.given(worker, turns).tolist() for worker in range(steps.workers)]


@given(STEPS)
def test_a_step_is_the_same_for_any_number_of_workers(steps: Steps) -> None:
    given_to = shares(steps)
    for step in range(steps.last - steps.first):
        turns = slice(step * steps.accumulation, (step + 1) * steps.accumulation)
        together = [index for share in given_to for index in share[turns]]
        start = (steps.first + step) * steps.per_step
        assert sorted(index for index in together if index != FILLER) == list(range(start, start + steps.per_step))
        assert len(together) == steps.weight * steps.per_step


@given(STEPS)
def test_one_worker_takes_them_in_the_order_of_the_manifest(steps: Steps) -> None:
    alone = Steps(steps.per_step, steps.first, steps.last)
    assert shares(alone) == [list(range(steps.first * steps.per_step, steps.last * steps.per_step))]
    assert alone.weight == 1


@given(STEPS, st.data())
def test_what_is_left_is_the_end_of_the_whole(steps: Steps, data: st.DataObject) -> None:
    later = data.draw(st.integers(steps.first, steps.last))
    rest = Steps(steps.per_step, later, steps.last, steps.workers)
    for whole, part in zip(shares(steps), shares(rest), strict=True):
        assert whole[len(whole) - len(part) :] == part


@given(STEPS, st.integers(1, 60))
def test_rows_dealt_in_turn_are_the_workers_shares(steps: Steps, most: int) -> None:
    """Each to the worker that has the fewest, the first of several: as Ray Data deals them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_BLOCKS", most)
        blocks = steps.blocks()
    dealt: list[list[int]] = [[] for _ in range(steps.workers)]
    for index in np.concatenate(blocks).tolist():
        min(dealt, key=len).append(index)
    assert dealt == shares(steps)
    assert len(blocks) <= most
