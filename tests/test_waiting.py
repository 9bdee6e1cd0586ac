"""The queue: who goes next, with whom, and what it costs; the speed, as it was measured."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from raydistil.serve.waiting import Limits, Queue, Speed, Ticket, size_of

LENGTHS = st.integers(1, 300)

# ---- which go together


def waiting(lengths: Sequence[int], limits: Limits, padded: bool = True) -> Queue[Ticket]:
    """One after another, a second apart."""
    found: Queue[Ticket] = Queue(limits, padded)
    for number, tokens in enumerate(lengths):
        found.add(Ticket(number, tokens, float(number)))
    return found


def taken(found: Queue[Ticket], now: float, spare: float = math.inf) -> list[list[int]]:
    """All of it: the numbers of each batch, in the order they were chosen in."""
    batches = []
    while len(found):
        batches.append(list(found.take(now, spare).rows))
    return batches


@given(
    st.lists(st.one_of(LENGTHS, st.sampled_from(["take", "leave"])), max_size=80),
    st.integers(1, 600), st.sampled_from([0, 3, 20, math.inf]), st.sampled_from([0, 5, 100, math.inf]), st.booleans(),
)  # fmt: skip
def test_the_oldest_is_in_the_next_batch_and_no_batch_costs_too_much(
    steps: list[int | str], budget: int, age_s: float, spare: float, padded: bool
) -> None:
    found: Queue[Ticket] = Queue(Limits(budget, 0, age_s), padded)
    inside: dict[int, Ticket] = {}
    for now, step in enumerate([*steps, *["take"] * len(steps)]):
        if isinstance(step, int):
            inside[now] = Ticket(now, step, now)
            found.add(inside[now])
        elif step == "leave" and inside:
            gone = inside.pop(sorted(inside)[len(inside) // 2])
            found.discard(gone)
            found.discard(gone)  # once more changes nothing
        elif step == "take" and inside:
            batch = found.take(now, spare)
            lengths = [ticket.tokens for ticket in batch.rows.values()]
            cost = len(lengths) * max(lengths) if padded else sum(lengths)
            assert min(inside) in batch.rows
            assert (cost, sum(lengths)) == (batch.cost(), batch.tokens)
            assert cost <= budget or len(lengths) == 1
            assert all(inside.pop(number) is ticket for number, ticket in batch.rows.items())
        assert (found.tokens, len(found)) == (sum(t.tokens for t in inside.values()), len(inside))
    assert not inside


@given(st.lists(LENGTHS, min_size=1, max_size=60), st.integers(1, 2000), st.integers(0, 100))
def test_padding_is_no_more_than_is_to_spare(lengths: list[int], budget: int, spare: int) -> None:
    for batch in taken(waiting(lengths, Limits(budget, 0, math.inf)), 0, spare):
        rows = [lengths[number] for number in batch]
        assert len(rows) * max(rows) - sum(rows) <= spare


def test_the_nearest_in_length_come_first() -> None:
    lengths = [50, 10, 51, 200, 49, 47, 52]
    assert taken(waiting(lengths, Limits(208, 0, math.inf)), 0)[0] == [0, 4, 2, 6]  # 4 x 52: a tie goes to the shorter
    assert taken(waiting(lengths, Limits(10**6, 0, math.inf)), 0)[0] == [0, 4, 2, 6, 5, 1, 3]
    assert taken(waiting(lengths, Limits(10**6, 0, math.inf)), 0, spare=1)[0] == [0, 4]
    assert taken(waiting([50, 60, 8, 50], Limits(100, 0, math.inf)), 0)[0] == [0, 3]


def test_without_padding_they_go_as_they_came() -> None:
    assert taken(waiting([5, 300, 1, 90, 5, 7], Limits(310, 0, math.inf), padded=False), 0) == [[0, 1, 2], [3, 4, 5]]


def test_who_is_overdue_goes_before_a_better_fit() -> None:
    lengths = [100, 108, 100, 100, 8]
    assert taken(waiting(lengths, Limits(220, 0, age_s=9)), now=5) == [[0, 2], [1, 3], [4]]
    assert taken(waiting(lengths, Limits(220, 0, age_s=9)), now=10) == [[0, 1], [2, 3], [4]]
    # not where most of the batch would be padding: the short one leads one of its own
    assert taken(waiting([300, 8, 300], Limits(600, 0, age_s=0)), now=10) == [[0, 2], [1]]


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_lengths_of_a_size_differ_by_less_than_a_quarter(one: int, other: int) -> None:
    low, high = sorted((one, other))
    assert size_of(low) <= size_of(high)
    assert size_of(one) != size_of(other) or high < 1.25 * low
    assert size_of(size_of(one)) == size_of(one) <= one


@given(st.lists(LENGTHS, min_size=1, max_size=120), st.integers(1, 2000), st.data())
def test_an_overdue_item_waits_for_few_batches(lengths: list[int], budget: int, data: st.DataObject) -> None:
    """At most for those that the older ones fill, size by size, however many younger ones come meanwhile."""
    found = waiting(lengths, Limits(budget, 0, age_s=0))
    last = len(lengths) - 1
    older: dict[int, list[int]] = {}
    for tokens in lengths:
        older.setdefault(size_of(tokens), []).append(tokens)
    most = sum(math.ceil(len(same) / max(1, budget // max(same))) for same in older.values())
    batches = 1
    while last not in found.take(last + batches, math.inf).rows:
        found.add(Ticket(last + batches, data.draw(st.sampled_from(lengths)), last + batches))
        batches += 1
    assert batches <= most


# ---- how long it takes


@given(st.floats(0, 1), st.floats(1e-6, 1e-2), st.lists(st.integers(1, 10_000), min_size=2, max_size=50))
def test_what_a_batch_takes_is_found(batch_s: float, token_s: float, costs: list[int]) -> None:
    assume(max(costs) > 1.5 * min(costs))
    speed = Speed()
    for cost in costs:
        speed.add(cost, cost, batch_s + token_s * cost)
    assert speed.seconds(3, 500) == pytest.approx(3 * batch_s + 500 * token_s, rel=1e-3, abs=1e-4)
    assert speed.spare() == pytest.approx(batch_s / token_s, rel=1e-2, abs=1)


@given(st.lists(st.tuples(st.integers(1, 10_000), st.floats(0, 10)), min_size=1, max_size=50))
def test_no_part_of_it_is_negative_whatever_was_measured(batches: list[tuple[int, float]]) -> None:
    speed = Speed()
    for cost, seconds in batches:
        speed.add(cost, cost, seconds)
    assert speed.spare() >= 0
    assert speed.seconds(1, 0) >= -1e-6 and speed.seconds(0, 1) >= 0


def test_speed_where_little_is_known() -> None:
    speed = Speed()
    assert (speed.rate, speed.spare(), speed.seconds(5, 100)) == (None, math.inf, 0.0)
    for _ in range(3):
        speed.add(tokens=50, cost=100, seconds=2.0)
    assert (speed.rate, speed.spare(), speed.seconds(5, 100)) == (pytest.approx(25), math.inf, pytest.approx(2.0))


def test_all_padding_is_worth_its_time_where_length_costs_none() -> None:
    speed = Speed()
    for cost in (100, 500, 900):
        speed.add(cost, cost, seconds=0.5)
    assert speed.spare() > 1e6
    assert speed.seconds(2, 10_000) == pytest.approx(1.0)


def test_rounding_keeps_no_equals_apart() -> None:
    """What would be the first token's price comes out a little below nothing in one of twenty of these."""
    for cost in range(2, 2000):
        speed = Speed()
        speed.add(1, 1, seconds=0.0)
        speed.add(cost, cost, seconds=0.1)
        assert speed.spare() >= 0
