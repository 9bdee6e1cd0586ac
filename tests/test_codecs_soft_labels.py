"""Soft labels on the wire: full logits, the K largest, draws."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from torch import Tensor

from raydistil.codecs.soft_labels import HEADER_BYTES, Logits, Sampled, SoftLabelCodec, TopK, _draw
from raydistil.errors import ConfigError, ModelError
from raydistil.types import Sparse

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
NUMBERS = st.floats(-8, 8, width=32)
LOGITS = arrays.arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 9)), elements=NUMBERS)
SEVERAL = arrays.arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(2, 9)), elements=NUMBERS)
BATCHES = st.integers(0, 2**64 - 1)
CODECS: tuple[SoftLabelCodec, ...] = (Logits(), TopK(3), Sampled(20))


def round_trip(codec: TopK | Sampled, logits_NC: Tensor, temperature: float = 1.0, key: int = 7) -> Sparse:
    return codec.decode(codec.encode(logits_NC, temperature, key), CPU)


def dense(sparse: Sparse, num_classes: int) -> Tensor:
    """The probabilities as [N, C], the tail left out."""
    return torch.zeros(len(sparse.tail_N), num_classes).scatter_add_(-1, sparse.ids_NK, sparse.probs_NK)


def same(left: Tensor | Sparse, right: Tensor | Sparse) -> bool:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return isinstance(left, Tensor) and isinstance(right, Tensor) and torch.equal(left, right)
    pairs = [(left.ids_NK, right.ids_NK), (left.probs_NK, right.probs_NK), (left.tail_N, right.tail_N)]
    return all(torch.equal(one, other) for one, other in pairs)


@given(SEVERAL)
def test_logits_come_back_rounded_to_fp16(logits: NDArray[np.float32]) -> None:
    encoded = Logits().encode(torch.from_numpy(logits), 2.0, 0)
    decoded = Logits().decode(encoded, CPU)
    assert decoded.dtype == torch.float16
    assert np.array_equal(decoded.numpy(), logits.astype(np.float16))
    assert len(encoded) == HEADER_BYTES + len(logits) * Logits().bytes_per_place(logits.shape[1])


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=5))
def test_a_number_comes_back_as_it_was(numbers: list[float]) -> None:
    """Whatever its size: fp16 would make 1000.5 of 1000.3 and inf of 70,000."""
    made_N1 = torch.tensor(numbers, dtype=torch.float32)[:, None]
    encoded = Logits().encode(made_N1, 2.0, 0)
    assert torch.equal(Logits().decode(encoded, CPU), made_N1)
    assert len(encoded) == HEADER_BYTES + len(numbers) * Logits().bytes_per_place(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_none_is_refused(bad: float) -> None:
    with pytest.raises(ModelError, match=f"expected a finite number from the teacher, got {bad}"):
        Logits().encode(torch.tensor([[1.0], [bad]]), 1.0, 0)


@given(LOGITS, st.integers(1, 10), st.sampled_from([0.5, 1.0, 2.0]))
def test_topk_keeps_the_largest_and_the_mass_of_the_rest(
    logits: NDArray[np.float32], k: int, temperature: float
) -> None:
    places, classes = logits.shape
    kept = min(k, classes)
    encoded = TopK(k).encode(torch.from_numpy(logits), temperature, 0)
    sparse = TopK(k).decode(encoded, CPU)
    assert len(encoded) == HEADER_BYTES + places * TopK(k).bytes_per_place(classes)
    assert sparse.ids_NK.shape == sparse.probs_NK.shape == (places, kept)
    exact_NC = (torch.from_numpy(logits).double() / temperature).softmax(-1)
    taken_NK = exact_NC.gather(-1, sparse.ids_NK)
    assert all(len(set(row)) == kept for row in sparse.ids_NK.tolist())
    assert torch.allclose(taken_NK, exact_NC.topk(kept).values, rtol=1e-5, atol=0)
    # fp16 rounds a logarithm by 2^-11 of itself, or by 2^-25 where it is tiny; scaling to a sum of 1 adds as much
    rounding_NK = 2**-10 * taken_NK.log().abs().amax(-1, keepdim=True) + 1e-6
    assert ((sparse.probs_NK / taken_NK - 1).abs() <= 1.1 * rounding_NK + 2**-10).all()
    assert torch.allclose(sparse.probs_NK.sum(-1) + sparse.tail_N, torch.ones(places), atol=1e-6)
    if kept == classes:
        assert (sparse.tail_N == 0).all()
    else:
        assert torch.allclose(sparse.tail_N.double(), exact_NC.sum(-1) - taken_NK.sum(-1), rtol=0.05, atol=1e-6)


def test_a_tiny_tail_is_not_lost_to_the_difference_from_one() -> None:
    logits_NC = torch.tensor([[0.0, -25.0, -25.0]])
    assert round_trip(TopK(1), logits_NC).tail_N.item() == pytest.approx(2 * math.exp(-25), rel=0.01)


@given(LOGITS, st.sampled_from([1, 5, 255, 256, 1000]), BATCHES)
def test_draws_are_shares_that_sum_to_one(logits: NDArray[np.float32], num_draws: int, key: int) -> None:
    codec, (places, classes) = Sampled(num_draws), logits.shape
    encoded = codec.encode(torch.from_numpy(logits), 1.0, key)
    sparse = codec.decode(encoded, CPU)
    counts_NK = (sparse.probs_NK.double() * num_draws).round()
    assert torch.allclose(counts_NK, sparse.probs_NK.double() * num_draws, rtol=1e-6)
    assert (counts_NK.sum(-1) == num_draws).all()
    assert (sparse.tail_N == 0).all() and sparse.tail_N.shape == (places,)
    distinct_N = (counts_NK > 0).sum(-1)
    assert (dense(sparse, classes) > 0).sum(-1).tolist() == distinct_N.tolist()
    assert sparse.ids_NK.shape[1] == (distinct_N.max() if places else 0)
    width = 1 if num_draws <= 255 else 2
    assert len(encoded) == HEADER_BYTES + int(distinct_N.sum()) * (2 + width) + places * width
    assert len(encoded) <= HEADER_BYTES + places * codec.bytes_per_place(classes)


@given(BATCHES, st.integers(1, 6))
def test_the_draws_of_a_place_depend_on_key_and_number_alone(key: int, places: int) -> None:
    logits_NC = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    every = dense(round_trip(Sampled(30), logits_NC, key=key), 50)
    others_NC = torch.cat([logits_NC[:places], torch.zeros(2, 50)])
    assert torch.equal(dense(round_trip(Sampled(30), others_NC, key=key), 50)[:places], every[:places])
    assert not torch.equal(dense(round_trip(Sampled(30), logits_NC, key=key ^ 1), 50), every)
    twins_NC = logits_NC[:1].expand(2, -1)
    first, second = dense(round_trip(Sampled(30), twins_NC, key=key), 50)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("over", ["places", "keys"])
def test_draws_are_unbiased_and_independent(over: str) -> None:
    """Mean p within 5 sigma, and the variance p (1 - p) / R of independent draws; four thousand times 12 draws."""
    probs_C = torch.tensor([0.55, 0.3, 0.149, 0.001, 0.0], dtype=torch.float64)
    logits_1C = probs_C.log().float()[None].clamp(min=-1e4)
    trials, draws = 4000, 12
    if over == "places":
        shares = dense(round_trip(Sampled(draws), logits_1C.expand(trials, -1)), 5).double()
    else:
        parts = [dense(round_trip(Sampled(draws), logits_1C, key=key), 5) for key in range(trials)]
        shares = torch.cat(parts).double()
    variance_C = probs_C * (1 - probs_C) / draws
    assert ((shares.mean(0) - probs_C).abs() <= 5 * (variance_C / trials).sqrt()).all()
    assert torch.allclose(shares.var(0)[:3], variance_C[:3], rtol=0.15)
    assert (shares[:, 4] == 0).all()


def test_the_ends_of_the_unit_interval_draw_no_impossible_class() -> None:
    """Two classes of one half between two of 0: from 0 on it is the first of them, from 0.5 on the second."""
    uniforms_NR = torch.tensor([[0.0, 0.5 - 2**-53, 0.5, 1 - 2**-53]], dtype=torch.float64)
    assert _draw(torch.tensor([[-1e4, 0.0, 0.0, -1e4]]), 1.0, uniforms_NR).tolist() == [[1, 1, 2, 2]]


def test_draws_tell_classes_apart_that_float32_would_not() -> None:
    """After a class of nearly all the mass come four of 2^-30; from the middle of each of them it is drawn."""
    logits_NC = torch.tensor([[0.0] + 4 * [-30 * math.log(2)]])
    middles_R = 1 + (torch.arange(4, dtype=torch.float64) + 0.5) * 2**-30
    assert _draw(logits_NC, 1.0, middles_R[None] / (1 + 4 * 2**-30)).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(("classes", "id_bytes"), [(65_536, 2), (65_537, 4)])
@pytest.mark.parametrize("last", [0, -1])
def test_ids_have_the_bytes_they_need(classes: int, id_bytes: int, last: int) -> None:
    logits_NC = torch.zeros(2, classes)
    logits_NC[1, last] = 100.0
    best = last % classes
    top, drawn = round_trip(TopK(4), logits_NC), round_trip(Sampled(9), logits_NC)
    assert top.ids_NK[1, 0] == drawn.ids_NK[1, 0] == best
    assert top.probs_NK[1, 0] == drawn.probs_NK[1, 0] == 1.0
    assert TopK(4).bytes_per_place(classes) == 4 * (id_bytes + 2) + 2
    assert len(TopK(4).encode(logits_NC, 1.0, 0)) == HEADER_BYTES + 2 * TopK(4).bytes_per_place(classes)
    assert Sampled(9).bytes_per_place(classes) == 9 * (id_bytes + 1) + 1
    distinct = int((drawn.probs_NK > 0).sum())
    assert len(Sampled(9).encode(logits_NC, 1.0, 7)) == HEADER_BYTES + distinct * (id_bytes + 1) + 2


@pytest.mark.parametrize(("draws", "count_bytes"), [(255, 1), (256, 2), (65_535, 2)])
def test_counts_have_the_bytes_they_need(draws: int, count_bytes: int) -> None:
    logits_NC = torch.tensor([[0.0, 100.0, 0.0]])
    encoded = Sampled(draws).encode(logits_NC, 1.0, 3)
    assert len(encoded) == HEADER_BYTES + 2 + 2 * count_bytes
    assert Sampled(draws).decode(encoded, CPU).probs_NK.tolist() == [[1.0]]


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_reads_any_memory_and_takes_any_float(codec: SoftLabelCodec) -> None:
    logits_NC = torch.randn(4, 11, generator=torch.Generator().manual_seed(0)).bfloat16()
    encoded = codec.encode(logits_NC, 1.0, 5)
    decoded = codec.decode(encoded, CPU)
    assert same(codec.decode(memoryview(encoded), CPU), decoded)
    assert same(codec.decode(pa.py_buffer(b"." + encoded).slice(1), CPU), decoded)
    assert same(codec.decode(codec.encode(logits_NC.double(), 1.0, 5), CPU), decoded)
    values = decoded if isinstance(decoded, Tensor) else decoded.probs_NK
    before = values.clone()
    values.zero_()
    again = codec.decode(encoded, CPU)
    assert torch.equal(again if isinstance(again, Tensor) else again.probs_NK, before)


@pytest.mark.parametrize("codec", [TopK(3), Sampled(20)])
def test_temperature_divides_the_logits(codec: TopK | Sampled) -> None:
    logits_NC = torch.randn(4, 11, generator=torch.Generator().manual_seed(0))
    assert same(round_trip(codec, logits_NC, temperature=4.0), round_trip(codec, logits_NC / 4))
    assert not same(round_trip(codec, logits_NC, temperature=4.0), round_trip(codec, logits_NC))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("codec", CODECS)
def test_logits_that_are_not_finite_are_an_error(codec: SoftLabelCodec, value: float) -> None:
    logits_NC = torch.zeros(3, 8)
    logits_NC[1, 5] = value
    with pytest.raises(ModelError, match=r"expected (finite )?teacher logits"):
        codec.encode(logits_NC, 1.0, 0)


def test_logits_beyond_fp16_are_an_error_that_names_the_others() -> None:
    logits_NC = torch.tensor([[0.0, -7e4]])
    with pytest.raises(ModelError, match=r"fit fp16 \(65,504\), got 7e\+04: ship topk or sampled"):
        Logits().encode(logits_NC, 1.0, 0)
    assert round_trip(TopK(2), logits_NC).probs_NK.tolist() == [[1.0, 0.0]]
    assert round_trip(Sampled(5), logits_NC).probs_NK.tolist() == [[1.0]]


@pytest.mark.parametrize(("codec", "number"), [(TopK, 0), (TopK, -3), (Sampled, 0), (Sampled, 65_536)])
def test_impossible_numbers_are_an_error(codec: type[TopK | Sampled], number: int) -> None:
    with pytest.raises(ConfigError, match=rf"expected .*1.*, got {number}: "):
        codec(number)


def test_what_a_place_costs_over_berts_vocabulary_and_two_classes() -> None:
    costs = {
        classes: (
            Logits().bytes_per_place(classes), TopK(32).bytes_per_place(classes),
            Sampled(12).bytes_per_place(classes), Sampled(50).bytes_per_place(classes),
        )
        for classes in (30522, 2)
    }  # fmt: skip
    assert costs == {30522: (61_044, 130, 37, 151), 2: (4, 10, 7, 7)}
