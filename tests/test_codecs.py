"""What crosses the wire from teacher to student, and what that costs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from raydistil.codecs import hidden
from raydistil.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FITS = st.floats(-65504, 65504, width=32)


@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=FITS))
def test_the_hidden_states_come_back_rounded_to_fp16_and_no_further(values: NDArray[np.float32]) -> None:
    decoded = hidden.decode(hidden.encode(torch.from_numpy(values), None), *values.shape, CPU)
    assert decoded.hidden_TD.dtype == torch.float32
    assert np.array_equal(decoded.hidden_TD.numpy(), values.astype(np.float16).astype(np.float32))
    assert decoded.logits_BC is None
    again = hidden.decode(hidden.encode(decoded.hidden_TD, None), *values.shape, CPU)
    assert torch.equal(again.hidden_TD, decoded.hidden_TD)


@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 5)), elements=st.floats(width=32)))
def test_class_logits_come_back_bit_for_bit(logits: NDArray[np.float32]) -> None:
    encoded = hidden.encode(torch.zeros(3, 2), torch.from_numpy(logits))
    decoded = hidden.decode(encoded, 3, len(logits), CPU)
    assert decoded.logits_BC is not None
    assert decoded.logits_BC.numpy().tobytes() == logits.tobytes()
    assert tuple(decoded.hidden_TD.shape) == (3, 2)


@pytest.mark.parametrize(("tokens", "width"), [(1, 768), (10, 384), (7, 3)])
def test_two_bytes_a_number_and_nothing_else(tokens: int, width: int) -> None:
    encoded = hidden.encode(torch.randn(tokens, width), None)
    assert set(encoded) == set(hidden.COLUMNS)
    assert len(encoded["hidden"]) == tokens * 2 * width
    assert encoded["logits"] == b""


@pytest.mark.parametrize("value", [65520.0, -1e6, float("inf"), float("nan")])
def test_what_does_not_fit_fp16_is_an_error(value: float) -> None:
    with pytest.raises(ModelError, match=r"expected hidden states that fit fp16 \(65,504\), got "):
        hidden.encode(torch.tensor([[0.0, value]]), None)


def test_the_decoded_targets_are_the_students_own() -> None:
    """The object store's memory is read-only; the tensors must not share it."""
    wire = hidden.encode(torch.ones(2, 2), torch.ones(1, 2))
    decoded = hidden.decode(wire, 2, 1, CPU)
    decoded.hidden_TD.add_(1)
    assert decoded.logits_BC is not None
    decoded.logits_BC.add_(1)
    assert torch.equal(hidden.decode(wire, 2, 1, CPU).hidden_TD, torch.ones(2, 2))
    assert torch.equal(hidden.decode(wire, 2, 1, CPU).logits_BC, torch.ones(1, 2))
