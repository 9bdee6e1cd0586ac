"""A device that runs a batch when a test lets it, and what is true of a batcher after every test."""

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from raydistil.serve.batcher import Batcher, Done, Item

WAIT_S = 20  # for what is sure to come; a test that waits so long has failed


class OutOfMemoryError(RuntimeError):
    """As torch calls it."""


class Device:
    """Doubles numbers. Where it is held, a batch is in it until `let` lets it go."""

    def __init__(self, held: bool = True, fails: Callable[[list[int]], BaseException | None] = lambda _: None) -> None:
        self.batches: list[list[int]] = []
        self.sizes: list[list[int]] = []
        self.overlaps = 0
        self._entered: queue.Queue[list[int]] = queue.Queue()
        self._permits = threading.Semaphore(0)
        self._held, self._fails = held, fails
        self._busy = threading.Lock()

    def run(self, items: list[Item[int]]) -> list[int]:
        self.overlaps += not self._busy.acquire(blocking=False)
        try:
            values = [item.payload for item in items]
            self.batches.append(values)
            self.sizes.append([item.tokens for item in items])
            self._entered.put(values)
            assert not self._held or self._permits.acquire(timeout=WAIT_S)
            error = self._fails(values)
            if error is not None:
                raise error
            return [2 * value for value in values]
        finally:
            self._busy.release()

    def next(self) -> list[int]:
        """The next batch that comes in; blocks the loop until it is there."""
        return self._entered.get(timeout=WAIT_S)

    def let(self, batches: int = 1) -> None:
        for _ in range(batches):
            self._permits.release()


def numbers(tokens: int, *values: int) -> list[Item[int]]:
    return [Item(tokens, value) for value in values]


def results(done: list[Done[int]]) -> list[int]:
    assert all(one.queued_s >= 0 and one.ran_s >= 0 for one in done)
    return [one.result for one in done]


def run(test: Callable[[], Awaitable[None]], device: Device, batcher: Batcher[int, int], threads: int = 0) -> None:
    """The test, and what is true after every one; `threads` are the batcher's before it."""

    async def whole() -> None:
        try:
            await test()
        finally:
            device.let(1000)
            await batcher.close()
        assert (batcher.load().items, batcher.load().tokens, batcher.load().running_tokens) == (0, 0, 0)

    before = threading.active_count() - threads
    asyncio.run(asyncio.wait_for(whole(), 3 * WAIT_S))
    assert device.overlaps == 0
    assert threading.active_count() <= before


async def submitted(batcher: Batcher[int, int], items: list[Item[int]], deadline: float | None = None) -> Any:
    """A task whose request is in the queue, or was refused."""
    task = asyncio.create_task(batcher.submit(items, deadline))
    await asyncio.sleep(0)
    return task


async def first_running(device: Device, batcher: Batcher[int, int], tokens: int = 1) -> Any:
    """The task of a request that is in the device; what comes after has to wait."""
    task = await submitted(batcher, numbers(tokens, 0))
    assert device.next() == [0]
    return task
