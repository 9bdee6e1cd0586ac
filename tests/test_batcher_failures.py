"""Requests that end early: their deadline passes, their caller leaves, the model fails at them. Nobody else's do."""

import asyncio
import itertools
import math
import time
import weakref
from collections.abc import Callable

import pytest
from device import Device, OutOfMemoryError, first_running, numbers, results, run, submitted

from raydistil.serve.batcher import Batcher, DeadlineExceeded, Item, ItemFailed, QueueFull, WrongCount
from raydistil.serve.waiting import Limits

WIDE = Limits(batch_tokens=1000, queue_tokens=10_000, age_s=math.inf)

# ---- deadlines and callers that leave


def test_who_waits_beyond_the_deadline_is_told_at_once_and_never_runs() -> None:
    device = Device()
    batcher = Batcher(device.run, WIDE)

    async def test() -> None:
        first = await first_running(device, batcher)
        with pytest.raises(DeadlineExceeded):
            await batcher.submit(numbers(1, 1, 2), deadline=asyncio.get_running_loop().time() + 0.01)
        with pytest.raises(DeadlineExceeded):
            await batcher.submit(numbers(1, 3), deadline=asyncio.get_running_loop().time())
        assert batcher.load().tokens == 0 and not first.done()
        other = await submitted(batcher, numbers(1, 4))
        device.let(2)
        assert (results(await first), results(await other), device.batches) == ([0], [8], [[0], [4]])

    run(test, device, batcher)


def test_the_deadline_holds_where_the_loop_is_late() -> None:
    device = Device()
    batcher = Batcher(device.run, WIDE)

    async def test() -> None:
        await first_running(device, batcher)
        deadline = time.monotonic() + 0.01
        late = await submitted(batcher, numbers(1, 1), deadline)
        other = await submitted(batcher, numbers(1, 2))
        time.sleep(0.02)  # the loop learns of nothing
        device.let(2)
        assert device.next() == [2]
        with pytest.raises(QueueFull):  # behind another one, and not because of a device that stands still
            await late
        assert results(await other) == [4]

    run(test, device, batcher)


def test_what_has_started_in_time_is_answered() -> None:
    device = Device()
    batcher = Batcher(device.run, WIDE)

    async def test() -> None:
        deadline = time.monotonic() + 1
        task = await submitted(batcher, numbers(1, 1), deadline)
        assert device.next() == [1]
        passed = asyncio.Event()
        asyncio.get_running_loop().call_at(deadline + 0.01, passed.set)
        await passed.wait()
        assert not task.done()
        device.let()
        assert results(await task) == [2]

    run(test, device, batcher)


def test_who_leaves_makes_room_and_is_not_run() -> None:
    device = Device()
    batcher = Batcher(device.run, Limits(100, 10_000, math.inf))

    async def test() -> None:
        first = await first_running(device, batcher)
        gone = [await submitted(batcher, numbers(100, *values)) for values in ([1], [2, 3])]
        stays = await submitted(batcher, numbers(100, 4))
        assert batcher.load().tokens == 400
        for task in [*gone, first]:  # the first is in the device: only its answer is lost
            task.cancel()
        await asyncio.wait([*gone, first])
        assert (batcher.load().tokens, batcher.load().items) == (100, 1)
        device.let(2)
        assert results(await stays) == [8]
        assert all(task.cancelled() for task in [*gone, first]) and device.batches == [[0], [4]]

    run(test, device, batcher)


def test_a_second_attempt_is_without_those_who_left() -> None:
    device = Device(fails=lambda values: ValueError() if len(values) > 1 else None)
    batcher = Batcher(device.run, WIDE)

    async def test() -> None:
        await first_running(device, batcher)
        tasks = [await submitted(batcher, numbers(1, value)) for value in range(1, 5)]
        device.let()
        assert device.next() == [1, 2, 3, 4]
        for task in (tasks[0], tasks[2], tasks[3]):
            task.cancel()
        device.let(2)
        assert results(await tasks[1]) == [4]
        assert device.batches == [[0], [1, 2, 3, 4], [2]]

    run(test, device, batcher)


def test_a_loop_that_ends_under_a_batch_leaves_a_batcher_that_works() -> None:
    device = Device()
    batcher = Batcher(device.run, WIDE)

    async def leave() -> None:
        await first_running(device, batcher)

    async def come_back() -> None:
        task = await submitted(batcher, numbers(1, 1))
        device.let()
        assert results(await task) == [2]

    asyncio.run(leave())
    device.let()
    run(come_back, device, batcher, threads=1)


# ---- failures


def beyond(most: int, error: type[BaseException]) -> Callable[[list[int]], BaseException | None]:
    return lambda values: error("no memory") if len(values) > most else None


@pytest.mark.parametrize("error", [MemoryError, OutOfMemoryError])
def test_a_batch_that_does_not_fit_is_run_in_parts(error: type[BaseException]) -> None:
    device = Device(held=False, fails=beyond(3, error))
    batcher = Batcher(device.run, WIDE)

    async def test() -> None:
        assert results(await batcher.submit(numbers(1, *range(10)))) == [2 * value for value in range(10)]
        assert device.batches == [[*range(10)], [*range(5)], [0, 1], [2, 3, 4], [*range(5, 10)], [5, 6], [7, 8, 9]]

    run(test, device, batcher)


@pytest.mark.parametrize("error", [MemoryError, OutOfMemoryError, ValueError, SystemExit, StopIteration])
def test_a_bad_item_fails_alone(error: type[BaseException]) -> None:
    device = Device(fails=lambda values: error("no") if 5 in values else None)
    batcher = Batcher(device.run, WIDE)

    async def test() -> None:
        await first_running(device, batcher)
        tasks = [await submitted(batcher, numbers(1, *values)) for values in ([1, 2], [3, 4, 5, 6], [7], [8])]
        device.let(100)
        assert [results(await tasks[n]) for n in (0, 2, 3)] == [[2, 4], [14], [16]]
        with pytest.raises(ItemFailed, match=f"item 2.*{error.__name__}") as failure:
            await tasks[1]
        assert (failure.value.index, type(failure.value.__cause__)) == (2, error)
        assert results(await batcher.submit(numbers(1, 9))) == [18]

    run(test, device, batcher)


def test_the_rest_of_a_request_that_failed_is_not_run() -> None:
    device = Device(fails=lambda values: ValueError() if 1 in values else None)
    batcher = Batcher(device.run, Limits(10, 10_000, math.inf))

    async def test() -> None:
        await first_running(device, batcher)
        task = await submitted(batcher, numbers(10, 1, 2, 3))
        device.let(2)
        with pytest.raises(ItemFailed):
            await task
        assert batcher.load().tokens == 0
        assert 3 not in itertools.chain(*device.batches)  # 2 may be in the device already

    run(test, device, batcher)


@pytest.mark.parametrize("off", [-1, 1])
def test_a_wrong_number_of_results_fails_those_items_and_no_more(off: int) -> None:
    calls: list[int] = []

    def miscounting(items: list[Item[int]]) -> list[int]:
        calls.append(len(items))
        return [0] * (len(items) + off * (len(items) > 1))

    async def test() -> None:
        with pytest.raises(ItemFailed) as failure:
            await batcher.submit(numbers(1, 1, 2, 3))
        assert isinstance(failure.value.__cause__, WrongCount)
        assert str(failure.value.__cause__) == f"expected 3 results, got {3 + off}"
        assert results(await batcher.submit(numbers(1, 4))) == [0]
        assert calls == [3, 1]

    batcher = Batcher(miscounting, WIDE)
    run(test, Device(), batcher)


def test_an_error_does_not_hold_on_to_what_did_not_fit() -> None:
    class Tensor:
        pass

    held: list[weakref.ref[Tensor]] = []

    def failing(_: list[Item[int]]) -> list[int]:
        activations = Tensor()
        held.append(weakref.ref(activations))
        raise OutOfMemoryError

    async def test() -> None:
        with pytest.raises(ItemFailed) as failure:
            await batcher.submit(numbers(1, 1))
        assert isinstance(failure.value.__cause__, OutOfMemoryError) and held[0]() is None
        assert batcher.load().rate is None  # nothing came of it, however quickly

    batcher = Batcher(failing, WIDE)
    run(test, Device(), batcher)
