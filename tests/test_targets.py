"""A teacher's targets as columns of the wire and back."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kept import sized

from raydistil.config.loss import LossConfig
from raydistil.config.targets import TargetsConfig
from raydistil.specs import TargetsSpec
from raydistil.targets import decode_targets, encode_targets
from raydistil.types import Sparse

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def spec(numbers: tuple[int, ...], soft: bool, **keys: Any) -> TargetsSpec:
    return TargetsSpec(TargetsConfig(**keys), LossConfig(), numbers, soft, 3)


@given(st.sets(st.integers(0, 12), max_size=5), st.integers(1, 6), st.sampled_from(["fp16", "bf16", "int8"]))
def test_every_state_comes_back_as_itself(chosen: set[int], tokens: int, dtype: str) -> None:
    wanted = spec(tuple(sorted(chosen)), soft=False, states=dtype)
    states = {n: torch.full((tokens, 3), float(n)) for n in chosen}
    columns = encode_targets(wanted, np.arange(0), states, None)
    assert columns["soft_labels"] == b""
    decoded = decode_targets(wanted, columns, tokens, CPU)
    assert decoded.soft_labels is None
    assert set(decoded.states) == chosen
    for n, state_TD in decoded.states.items():
        torch.testing.assert_close(state_TD, states[n], rtol=1e-6, atol=1e-6)


def test_logits_travel_in_fp16() -> None:
    wanted = spec((), soft=True)
    logits_NC = torch.tensor([[1.0, -2.5, 3.140625], [0.0, 1e-3, 7.0]])
    decoded = decode_targets(wanted, encode_targets(wanted, np.arange(2), {}, logits_NC), 9, CPU)
    assert torch.equal(decoded.soft_labels, logits_NC.half())
    assert decoded.states == {}


def test_draws_depend_on_seed_and_visit_alone() -> None:
    wanted = spec((), soft=True, codec="sampled", num_draws=30)
    logits_NC = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    same = [encode_targets(wanted, np.full(5, 8), {}, logits_NC) for _ in range(2)]
    assert same[0] == same[1] != encode_targets(wanted, np.full(5, 9), {}, logits_NC)
    decoded = decode_targets(wanted, same[0], 5, CPU).soft_labels
    assert isinstance(decoded, Sparse)
    torch.testing.assert_close(decoded.probs_NK.sum(-1), torch.ones(5))


@pytest.mark.parametrize("codec", ["logits", "topk", "sampled"])
def test_parts_of_the_places_come_back_as_one(codec: str) -> None:
    """An odd number of places a part, so that no part ends where the next may begin."""
    wanted = spec((), soft=True, **sized(codec, 3, 300))
    logits_NC = 3 * torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    columns = encode_targets(wanted, np.arange(7), {}, (part for part in logits_NC.split(3)))
    got = decode_targets(wanted, columns, 7, CPU).soft_labels
    if codec == "logits":
        assert torch.equal(got, logits_NC.half().float())
        return
    assert isinstance(got, Sparse)
    assert got.ids_NK.shape == got.probs_NK.shape and len(got.ids_NK) == len(got.tail_N) == 7
    torch.testing.assert_close(got.probs_NK.sum(-1) + got.tail_N, torch.ones(7))
    kept = torch.zeros(7, 40).scatter_add_(-1, got.ids_NK, got.probs_NK)
    exact = torch.softmax(logits_NC / LossConfig().temperature, -1)
    assert codec == "sampled" or torch.equal(kept.argmax(-1), exact.argmax(-1))
    assert (kept - exact)[kept > 0].abs().max() < (0.1 if codec == "sampled" else 2e-3)


def test_no_places_are_a_part_too() -> None:
    wanted = spec((), soft=True)
    columns = encode_targets(wanted, np.arange(0), {}, torch.zeros(0, 5))
    assert decode_targets(wanted, columns, 4, CPU).soft_labels.shape == (0, 5)


def test_the_largest_carry_the_temperature() -> None:
    wanted = spec((), soft=True, codec="topk", top_k=2)
    logits_NC = torch.tensor([[4.0, 2.0, 0.0, -2.0]])
    decoded = decode_targets(wanted, encode_targets(wanted, np.arange(1), {}, logits_NC), 1, CPU).soft_labels
    assert isinstance(decoded, Sparse)
    expected = torch.softmax(logits_NC / LossConfig().temperature, -1)
    torch.testing.assert_close(decoded.probs_NK, expected[:, :2], rtol=2e-3, atol=0)
    torch.testing.assert_close(decoded.tail_N, expected[:, 2:].sum(-1), rtol=2e-3, atol=0)
