"""What crosses the wire from teacher to student, and what that costs."""

import warnings
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from raydistil.codecs.states import StateDtype, bytes_per_token, decode_states, encode_states
from raydistil.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FITS = st.floats(-65504, 65504, width=32)
STATES = arrays.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=FITS)
DTYPES: tuple[StateDtype, ...] = ("fp16", "bf16", "int8")


def round_trip(states_TD: torch.Tensor, dtype: StateDtype) -> torch.Tensor:
    return decode_states(encode_states(states_TD, dtype), len(states_TD), dtype, CPU)


@pytest.mark.parametrize(("dtype", "rounding"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@given(values=STATES)
def test_states_in_two_bytes_are_rounded_once(
    dtype: StateDtype, rounding: torch.dtype, values: NDArray[np.float32]
) -> None:
    states_TD = torch.from_numpy(values)
    decoded = round_trip(states_TD, dtype)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, states_TD.to(rounding).float())
    assert torch.equal(round_trip(decoded, dtype), decoded)


@given(STATES)
def test_states_in_one_byte_are_off_by_half_a_step_at_most(values: NDArray[np.float32]) -> None:
    decoded = round_trip(torch.from_numpy(values), "int8").numpy()
    step_T1 = np.abs(values).max(-1, keepdims=True) / 127
    assert decoded.dtype == np.float32
    assert (np.abs(decoded - values) <= 0.50001 * step_T1 + np.finfo(np.float32).tiny).all()
    assert (decoded[np.abs(values).max(-1) == 0] == 0).all()


def test_states_in_one_byte_are_multiples_of_the_tokens_own_step() -> None:
    states_TD = torch.tensor([[127.0, -64.0, 0.4, 0.6], [-0.0127, 0.0001, 0.0, 0.005]])
    expected_TD = torch.tensor([[127.0, -64.0, 0.0, 1.0], [-0.0127, 0.0001, 0.0, 0.005]])
    assert torch.allclose(round_trip(states_TD, "int8"), expected_TD, rtol=1e-6, atol=0)


def test_a_token_of_zeros_has_a_step_to_divide_by() -> None:
    """0 / 0 is no number, and what a cast to int8 makes of one is the machine's choice."""
    smallest = np.float32(np.finfo(np.float32).tiny)
    assert encode_states(torch.zeros(1, 3), "int8") == smallest.tobytes() + bytes(3)


@pytest.mark.parametrize(
    ("dtype", "bert_base", "minilm"), [("fp16", 1536, 768), ("bf16", 1536, 768), ("int8", 772, 388)]
)
def test_what_a_token_costs(dtype: StateDtype, bert_base: int, minilm: int) -> None:
    assert (bytes_per_token(768, dtype), bytes_per_token(384, dtype)) == (bert_base, minilm)
    for tokens in (1, 7):
        assert len(encode_states(torch.randn(tokens, 768), dtype)) == tokens * bert_base
        assert len(encode_states(torch.randn(tokens, 384).bfloat16(), dtype)) == tokens * minilm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [bytes, memoryview, pa.py_buffer, lambda raw: pa.py_buffer(b"..." + raw).slice(3)])
def test_states_are_read_from_any_memory_and_leave_it_alone(dtype: StateDtype, form: Any) -> None:
    states_TD = torch.randn(3, 5)
    buffer = form(encode_states(states_TD, dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of tensors over read-only memory
        first_TD = decode_states(buffer, 3, dtype, CPU)
    before_TD = first_TD.clone()
    first_TD.zero_()
    assert torch.equal(decode_states(buffer, 3, dtype, CPU), before_TD)
    assert torch.allclose(before_TD, states_TD, rtol=0.01, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_states_that_are_not_finite_are_an_error(dtype: StateDtype, value: float) -> None:
    with pytest.raises(ModelError, match=r"expected finite hidden states, got (inf|nan): set teacher.precision"):
        encode_states(torch.tensor([[0.0, 1.0], [value, 2.0]]), dtype)


def test_states_beyond_the_format_are_an_error_that_names_another() -> None:
    large = torch.tensor([[1.0, -65520.0]])
    with pytest.raises(ModelError, match=r"fit fp16 \(65,504\), got 6.552e\+04: .* ship int8 or bf16"):
        encode_states(large, "fp16")
    assert round_trip(large, "bf16")[0, 1] == -65536
    largest = torch.tensor([[1.0, 3.4e38]])
    with pytest.raises(ModelError, match=r"fit bf16 \(3.39e\+38\), got 3.4e\+38: .* ship int8$"):
        encode_states(largest, "bf16")
    assert round_trip(largest, "int8")[0, 1] == pytest.approx(3.4e38, rel=1e-6)
