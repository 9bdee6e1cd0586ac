"""The batcher: every item is answered once, with its own result, whatever arrives, fails or leaves."""

import asyncio
import gc
import itertools
import math
import time
import weakref
from typing import Any

import pytest
from device import Device, first_running, numbers, results, run, submitted
from hypothesis import given
from hypothesis import strategies as st

from raydistil.serve import batcher as batching
from raydistil.serve.batcher import (
    RETRY_S,
    Batch,
    Batcher,
    DeadlineExceeded,
    Draining,
    Item,
    ItemFailed,
    NotServed,
    QueueFull,
)
from raydistil.serve.waiting import Limits

WIDE = Limits(batch_tokens=1000, queue_tokens=10_000, age_s=math.inf)

# ---- batches


def test_who_comes_while_a_batch_runs_joins_the_next() -> None:
    device = Device()
    batcher = Batcher(device.run, WIDE)

    async def test() -> None:
        first = await first_running(device, batcher)
        others = [await submitted(batcher, numbers(10, *values)) for values in ([1], [2, 3], [4])]
        assert not first.done() and device.batches == [[0]]
        device.let(2)
        assert results(await first) == [0]
        assert [results(await other) for other in others] == [[2], [4, 6], [8]]
        assert device.batches == [[0], [1, 2, 3, 4]]
        assert await batcher.submit([]) == []

    run(test, device, batcher)


def test_a_busy_loop_does_not_keep_the_device_waiting() -> None:
    device = Device(held=False)
    batcher = Batcher(device.run, Limits(10, 10_000, math.inf))

    async def test() -> None:
        task = await submitted(batcher, numbers(10, *range(5)))
        assert [device.next() for _ in range(5)] == [[0], [1], [2], [3], [4]]  # and the loop did nothing meanwhile
        assert not task.done()
        assert results(await task) == [0, 2, 4, 6, 8]

    run(test, device, batcher)


@pytest.mark.parametrize(("padded", "expected"), [(True, [[1, 3], [2], [4]]), (False, [[1, 2], [3], [4]])])
def test_a_batch_is_within_its_budget_and_what_is_beyond_runs_alone(padded: bool, expected: list[list[int]]) -> None:
    device = Device()
    batcher = Batcher(device.run, Limits(100, 10_000, math.inf), padded)

    async def test() -> None:
        await first_running(device, batcher)
        items = [Item(40, 1), Item(60, 2), Item(50, 3), Item(5000, 4)]
        task = await submitted(batcher, items)
        device.let(4)
        assert results(await task) == [2, 4, 6, 8]
        assert device.batches[1:] == expected

    run(test, device, batcher)


def test_seen_is_told_what_became_of_each_batch() -> None:
    device = Device(fails=lambda values: ValueError() if 2 in values else None)
    seen: list[Batch] = []
    batcher = Batcher(device.run, WIDE, seen=seen.append)

    async def test() -> None:
        await first_running(device, batcher, tokens=7)
        tasks = [await submitted(batcher, [item]) for item in (Item(10, 1), Item(30, 2), Item(20, 3))]
        device.let(10)
        (one,), failure, (other,) = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(failure, ItemFailed)
        assert [(b.items, b.tokens, b.padded_tokens, b.failures) for b in seen] == [(1, 7, 7, 0), (3, 60, 90, 1)]
        assert all(len(b.waits_s) == b.items and min(b.waits_s) >= 0 and b.seconds > 0 for b in seen)
        assert {one.queued_s, other.queued_s} < set(seen[1].waits_s)
        assert one.ran_s == other.ran_s == seen[1].seconds

    run(test, device, batcher)


def test_an_observer_that_fails_is_reported_and_nothing_else() -> None:
    device = Device(held=False)
    reported: list[Any] = []

    def seen(_: Batch) -> None:
        raise ValueError("no such metric")

    batcher = Batcher(device.run, WIDE, seen=seen)

    async def test() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
        assert results(await batcher.submit(numbers(1, 1))) == [2]
        assert results(await batcher.submit(numbers(1, 2))) == [4]
        assert [str(error) for error in reported] == ["no such metric"] * 2

    run(test, device, batcher)


# ---- refusals


@pytest.mark.parametrize("values", [(5,), (5, 6, 7)])
def test_a_request_comes_in_whole_or_not_at_all(values: tuple[int, ...]) -> None:
    device = Device()
    batcher = Batcher(device.run, Limits(1000, 100, math.inf))

    async def test() -> None:
        await first_running(device, batcher)
        big = await submitted(batcher, numbers(60, 1, 2))  # nothing waits: it comes in however large
        assert (batcher.load().tokens, batcher.load().items) == (120, 2)
        with pytest.raises(QueueFull) as refusal:
            await batcher.submit(numbers(1, *values))
        assert refusal.value.retry_after_s == RETRY_S
        assert (batcher.load().tokens, batcher.load().items) == (120, 2)
        device.let(3)
        assert results(await big) == [2, 4]
        assert results(await batcher.submit(numbers(1, *values))) == [2 * value for value in values]

    run(test, device, batcher)


def test_up_to_the_bound_all_come_in() -> None:
    device = Device()
    batcher = Batcher(device.run, Limits(1000, 100, math.inf))

    async def test() -> None:
        await first_running(device, batcher)
        tasks = [await submitted(batcher, numbers(25, value)) for value in range(1, 5)]
        late = await submitted(batcher, numbers(1, 5))
        assert batcher.load().tokens == 100
        device.let(2)
        assert [results(await task) for task in tasks] == [[2], [4], [6], [8]]
        with pytest.raises(QueueFull):
            await late

    run(test, device, batcher)


def test_when_to_come_again_follows_from_what_was_measured() -> None:
    device = Device()
    batcher = Batcher(device.run, Limits(1000, 600, math.inf))

    async def test() -> None:
        batcher._speed.add(tokens=1000, cost=1000, seconds=100.0)
        await first_running(device, batcher, tokens=10)  # a second at most
        await submitted(batcher, numbers(100, *range(1, 6)))
        load = batcher.load()
        assert (load.tokens, load.items, load.running_tokens, load.rate) == (500, 5, 10, 10.0)
        assert 50 <= load.wait_s <= 51
        for items, expected in ((numbers(100, 6, 7, 8), 20), (numbers(5000, 6), 50)):  # the latter: when nobody waits
            with pytest.raises(QueueFull) as refusal:
                await batcher.submit(items)
            assert expected <= refusal.value.retry_after_s <= expected + 1
        with pytest.raises(QueueFull) as refusal:
            await batcher.submit(numbers(1, 6), deadline=time.monotonic() + 30)
        assert 20.1 - 1e-3 <= refusal.value.retry_after_s <= 21.1  # its own token takes .1 s
        in_time = await submitted(batcher, numbers(1, 6), deadline=time.monotonic() + 1000)
        device.let(10)
        assert results(await in_time) == [12]

    run(test, device, batcher)


# ---- the end


def test_an_idle_device_that_was_slow_once_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(held=False)
    batcher = Batcher(device.run, WIDE)

    async def test() -> None:
        await batcher.submit(numbers(10, 1))
        batcher._speed.add(tokens=10, cost=10, seconds=100.0)
        batcher._last = 10, 100.0

        def soon() -> float:
            return asyncio.get_running_loop().time() + 10

        with pytest.raises(DeadlineExceeded, match=r"expected a later deadline: this takes 5\d\.\d+ s by itself"):
            await batcher.submit(numbers(10, 1), soon())
        monkeypatch.setattr(batching, "PROBE_S", 0.0)
        assert results(await batcher.submit(numbers(10, 1), soon())) == [2]
        monkeypatch.setattr(batching, "PROBE_S", 1000.0)  # it was fast then: the slow one counts no more
        assert batcher._wait_s(time.monotonic(), 10) > 10
        assert results(await batcher.submit(numbers(10, 1), soon())) == [2]

    run(test, device, batcher)


def test_a_request_that_is_too_large_for_its_deadline_is_told_so() -> None:
    device = Device()
    batcher = Batcher(device.run, WIDE)

    async def test() -> None:
        large = await submitted(batcher, numbers(1000, 1, 2), time.monotonic() + 0.05)
        assert device.next() == [1]
        time.sleep(0.1)
        device.let(2)
        with pytest.raises(DeadlineExceeded):  # nobody was before it: to come again would not help
            await large

    run(test, device, batcher)


def test_nothing_is_left_of_a_request_that_was_answered() -> None:
    class Text:
        pass

    async def test() -> None:
        text = Text()
        left = weakref.ref(text)
        await batcher.submit([Item(1, text)], deadline=time.monotonic() + 1000)
        del text
        await batcher.submit([Item(1, Text())])  # so the thread is done with the first
        gc.collect()
        assert left() is None

    batcher: Batcher[Any, int] = Batcher(lambda items: [0] * len(items), WIDE)
    run(test, Device(), batcher)


def test_drain_answers_all_there_is_and_takes_no_more() -> None:
    device = Device()
    batcher = Batcher(device.run, Limits(10, 10_000, math.inf))

    async def test() -> None:
        tasks = [await first_running(device, batcher), await submitted(batcher, numbers(10, 1, 2))]
        drained = asyncio.create_task(batcher.drain())
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await batcher.submit(numbers(1, 3))
        assert not drained.done()
        device.let(3)
        await drained
        assert [results(await task) for task in tasks] == [[0], [2, 4]]
        await batcher.drain()

    run(test, device, batcher)


def test_close_ends_with_the_batch_that_runs() -> None:
    device = Device()
    batcher = Batcher(device.run, WIDE)

    async def test() -> None:
        first, second = await first_running(device, batcher), await submitted(batcher, numbers(1, 1))
        closed = asyncio.create_task(batcher.close())
        with pytest.raises(Draining):
            await second
        assert not closed.done() and not first.done()
        device.let()
        await closed
        assert results(await first) == [0]
        with pytest.raises(Draining):
            await batcher.submit(numbers(1, 2))
        assert device.batches == [[0]]

    run(test, device, batcher)


def test_an_item_is_of_one_token_at_least() -> None:
    with pytest.raises(ValueError, match="expected at least one token, got 0"):
        Item(0, "")


# ---- whatever happens

STEPS = st.one_of(
    st.tuples(st.sampled_from(["submit", "hurry"]), st.lists(st.integers(1, 120), min_size=1, max_size=6)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("let"), st.integers(1, 3)),
    st.tuples(st.just("turn"), st.integers(1, 3)),
)


@given(
    st.lists(STEPS, max_size=40), st.integers(1, 200), st.integers(1, 400), st.sampled_from([0, math.inf]),
    st.booleans(), st.integers(2, 9),
)  # fmt: skip
def test_every_request_is_answered_once_with_its_own(
    steps: list[tuple[str, Any]], budget: int, bound: int, age_s: float, padded: bool, bad: int
) -> None:
    device = Device(fails=lambda values: ValueError() if any(value % bad == 1 for value in values) else None)
    seen: list[Batch] = []
    batcher = Batcher(device.run, Limits(budget, bound, age_s), padded, seen.append)
    ids = itertools.count()
    asked: list[tuple[list[int], Any]] = []
    cancelled: set[int] = set()
    hurried: set[int] = set()

    async def step(kind: str, value: Any) -> None:
        if kind in ("submit", "hurry"):
            before = batcher.load().tokens
            items = [Item(tokens, next(ids)) for tokens in value]
            deadline = time.monotonic() + 0.001 if kind == "hurry" else None
            hurried.update([len(asked)] if kind == "hurry" else [])
            asked.append(([item.payload for item in items], await submitted(batcher, items, deadline)))
            assert batcher.load().tokens <= max(bound, sum(value), before)
        elif kind == "cancel" and value < len(asked):
            cancelled.add(value)
            asked[value][1].cancel()
        elif kind == "let":
            device.let(value)
        for _ in range(value if kind == "turn" else 0):
            await asyncio.sleep(0)

    async def test() -> None:
        for kind, value in steps:
            await step(kind, value)
        device.let(10_000)
        await batcher.drain()
        answers = await asyncio.gather(*(task for _, task in asked), return_exceptions=True)
        for number, ((values, _), answer) in enumerate(zip(asked, answers, strict=True)):
            if isinstance(answer, list):
                assert results(answer) == [2 * value for value in values]
                assert not any(value % bad == 1 for value in values)
            elif isinstance(answer, ItemFailed):
                assert values[answer.index] % bad == 1
            elif isinstance(answer, QueueFull):
                assert number in hurried or not set(values) & set(itertools.chain(*device.batches))
            elif isinstance(answer, DeadlineExceeded):
                assert number in hurried
            else:
                assert isinstance(answer, asyncio.CancelledError) and number in cancelled

    run(test, device, batcher)
    for lengths in device.sizes:
        assert (len(lengths) * max(lengths) if padded else sum(lengths)) <= budget or len(lengths) == 1
    succeeded = [v for b in device.batches if not any(value % bad == 1 for value in b) for v in b]
    assert len(succeeded) == len(set(succeeded))  # none is run again that had its result
    assert sum(batch.items for batch in seen) >= len(set(itertools.chain(*device.batches)))


def test_errors_are_one_family() -> None:
    for error in (QueueFull(1.5), Draining(), DeadlineExceeded(), ItemFailed(3, ValueError())):
        assert isinstance(error, NotServed) and str(error).startswith("expected ")
