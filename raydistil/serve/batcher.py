"""Batches for a device that does one at a time. It asks for the next when it is free: there is no delay to set.

Requests wait on the event loop. One thread takes a batch of what waits, runs it, hands the answers to the loop and
takes the next: a busy loop does not keep the device waiting, and who arrives while a batch runs joins the next.

    NotServed                what `submit` raises
    ├── QueueFull            too much waits for this request to come in, or it did not start in time behind others
    ├── Draining             no more requests are taken
    ├── DeadlineExceeded     not all of its items had started in time, and meanwhile nothing was done
    └── ItemFailed           the model fails at one of its items
"""

import asyncio
import itertools
import math
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from raydistil.serve.waiting import Forming, Lateness, Limits, Queue, Speed, Ticket

P = TypeVar("P")  # what the model reads of an item
R = TypeVar("R")  # what it makes of it
RETRY_S = 1.0  # as long as no batch was timed
PROBE_S = 1.0  # an idle device that was too slow as long ago is tried again


class NotServed(Exception):
    """A request without an answer; its text is for who sent it."""


class QueueFull(NotServed):
    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"expected a shorter queue, retry in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class Draining(NotServed):
    def __init__(self) -> None:
        super().__init__("expected a server that takes requests, this one is stopping")


class DeadlineExceeded(NotServed):
    def __init__(self, takes_s: float | None = None) -> None:
        """`takes_s`: what it would take with nobody before it; None: the deadline has passed."""
        why = "expected to start before the deadline, it passed"
        super().__init__(why if takes_s is None else f"expected a later deadline: this takes {takes_s:.3f} s by itself")


class ItemFailed(NotServed):
    """`__cause__` is the model's error."""

    def __init__(self, index: int, cause: BaseException) -> None:
        super().__init__(f"expected a result for item {index}, the model failed: {type(cause).__name__}")
        self.index = index
        self.__cause__ = cause


class WrongCount(Exception):
    """The model does not give one result for each item: nobody knows which is whose."""


# ---- what goes in and comes out


@dataclass(frozen=True, slots=True)
class Item(Generic[P]):
    tokens: int
    payload: P

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"expected at least one token, got {self.tokens}: no limit would hold")


@dataclass(frozen=True, slots=True)
class Done(Generic[R]):
    result: R
    queued_s: float
    ran_s: float  # its batch


@dataclass(frozen=True, slots=True)
class Batch:
    """What became of a batch."""

    items: int
    tokens: int
    padded_tokens: int
    waits_s: tuple[float, ...]  # of each item
    seconds: float  # on the device, second attempts included
    failures: int  # items the model fails at


@dataclass(frozen=True, slots=True)
class Load:
    items: int  # that wait, as do the tokens
    tokens: int
    running_tokens: int
    rate: float | None  # tokens a second of the device's time; None: no batch was timed yet
    wait_s: float  # for who comes now, as far as is known
    busy_s: float  # that batches took, all together


# ---- requests


class Request(Generic[R]):
    """Items that are answered together, at a time that was foreseen. Only the loop's thread changes it."""

    def __init__(self, size: int, foreseen: float, is_first: bool) -> None:
        """`is_first`: nobody is before it."""
        self.foreseen, self.is_first = foreseen, is_first
        self.answer: asyncio.Future[list[Done[R]] | NotServed] = asyncio.get_running_loop().create_future()
        self._done: dict[int, Done[R]] = {}
        self._size = size

    def put(self, index: int, done: Done[R]) -> None:
        self._done[index] = done
        if len(self._done) == self._size:
            self.end([self._done[place] for place in range(self._size)])

    def end(self, answer: list[Done[R]] | NotServed) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)


@dataclass(slots=True, eq=False)
class Entry(Ticket, Generic[P, R]):
    item: Item[P]
    index: int  # in its request
    request: Request[R]
    deadline: float
    has_started: bool = False

    def is_wanted(self) -> bool:
        return not self.request.answer.done()


@dataclass(frozen=True, slots=True)
class Outcome(Generic[R]):
    """By an entry's number; who is in neither was not wanted any more."""

    results: dict[int, R]
    errors: dict[int, BaseException]


# ---- the batcher


class Batcher(Generic[P, R]):
    """Requests in, answers out; `run` is called in one thread, and tells `seen` of each batch on the loop's."""

    def __init__(
        self,
        run: Callable[[list[Item[P]]], list[R]],
        limits: Limits,
        padded: bool = True,
        seen: Callable[[Batch], None] | None = None,
    ) -> None:
        self._run, self._limits, self._padded, self._seen = run, limits, padded, seen
        self._queue: Queue[Entry[P, R]] = Queue(limits, padded)
        self._speed, self._late, self._busy_s = Speed(), Lateness(), 0.0
        self._running: tuple[Forming[Entry[P, R]], float] | None = None  # and since when
        self._ended, self._last = -math.inf, (1, 0.0)  # the last batch, and what it cost and took
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._draining = self._closed = False
        self._changed = threading.Condition()  # holds the lock of everything above
        self._open: set[asyncio.Future[list[Done[R]] | NotServed]] = set()

    async def submit(self, items: Sequence[Item[P]], deadline: float | None = None) -> list[Done[R]]:
        """What the model makes of each item; all of it is to be done by `deadline`, a time of the loop's clock: what
        cannot be, as far as is known, is not taken, and what has not started then is not run.

        Raises NotServed: the request is then without effect, as it is where the caller is cancelled.
        """
        if not items:
            return []
        loop = asyncio.get_running_loop()
        entries = self._admit(items, math.inf if deadline is None else deadline)
        timer = None if deadline is None else loop.call_at(deadline, self._expire, entries)
        try:
            answer = await entries[0].request.answer
        finally:
            self._withdraw(entries)
            if timer is not None:
                timer.cancel()
        if isinstance(answer, NotServed):
            raise answer
        return answer

    def check(self, deadline: float) -> None:
        """Raises NotServed where no request could come in now: it need not be read."""
        with self._changed:
            self._check(1, deadline, time.monotonic())

    def load(self) -> Load:
        now = time.monotonic()
        with self._changed:
            running = self._running[0].tokens if self._running else 0
            queue, rate = self._queue, self._speed.rate
            return Load(len(queue), queue.tokens, running, rate, self._wait_s(now, queue.tokens), self._busy_s)

    async def drain(self) -> None:
        """Take no more requests, and return when all there are have their answers."""
        self._draining = True
        waiting = [answer for answer in self._open if not answer.done()]
        if waiting:
            await asyncio.wait(waiting)

    async def close(self) -> None:
        """End with the batch that runs; who waits is told so. After `drain` nobody does."""
        with self._changed:
            self._draining = self._closed = True
            while self._queue.tokens:
                for entry in self._queue.take(0.0, math.inf).rows.values():
                    entry.request.end(Draining())
            self._changed.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    # ---- on the loop

    def _admit(self, items: Sequence[Item[P]], deadline: float) -> list[Entry[P, R]]:
        now = time.monotonic()
        with self._changed:
            self._check(sum(item.tokens for item in items), deadline, now)
            foreseen = now + self._wait_s(now, self._ahead(self._queue.tokens) + sum(item.tokens for item in items))
            request: Request[R] = Request(len(items), foreseen, self._is_idle())
            entries = [
                Entry(next(self._numbers), item.tokens, now, item, index, request, deadline)
                for index, item in enumerate(items)
            ]
            for entry in entries:
                self._queue.add(entry)
            self._start()
        self._open.add(request.answer)
        request.answer.add_done_callback(self._open.discard)
        return entries

    def _check(self, tokens: int, deadline: float, now: float) -> None:
        """Raises NotServed for a request that is not to come in."""
        if self._draining:
            raise Draining
        if deadline <= now:
            raise DeadlineExceeded
        if self._is_idle():
            self._check_idle(tokens, deadline, now)
            return
        waiting = self._queue.tokens
        over = waiting + tokens - self._limits.queue_tokens
        if waiting and over > 0:
            raise QueueFull(self._wait_s(now, min(over, waiting)) if self._speed.rate else RETRY_S)
        late_s = now + self._wait_s(now, self._ahead(waiting) + tokens) - deadline + self._late.seconds(now)
        if late_s > 0:
            raise QueueFull(late_s)

    def _check_idle(self, tokens: int, deadline: float, now: float) -> None:
        """By the last batch, too: a slow one is soon forgotten when others are fast. Where it was one of the slow, the
        device is tried again after a while, or it would shut everybody out for good.
        """
        cost, seconds = self._last
        takes_s = min(self._wait_s(now, tokens), seconds * max(1.0, tokens / cost))
        if now + takes_s > deadline and now - self._ended < PROBE_S:
            raise DeadlineExceeded(takes_s)

    def _is_idle(self) -> bool:
        return not self._queue.tokens and self._running is None

    def _ahead(self, waiting: int) -> int:
        """Tokens that are run before who comes now: where batches are full, the last one will be, too."""
        batch = self._limits.batch_tokens
        return waiting if waiting < batch else math.ceil(waiting / batch) * batch

    def _wait_s(self, now: float, tokens: int) -> float:
        """Until the batch that runs and `tokens` after it are done. Where much waits, there is little padding."""
        left_s = 0.0
        if self._running:
            batch, since = self._running
            left_s = max(0.0, since + self._speed.seconds(1, batch.cost()) - now)
        return left_s + self._speed.seconds(math.ceil(tokens / self._limits.batch_tokens), tokens)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
            self._thread.start()
        self._changed.notify()

    def _expire(self, entries: list[Entry[P, R]]) -> None:
        """What waited behind others that were done meanwhile has met a queue too long, as what is refused at once."""
        request = entries[0].request
        if all(entry.has_started for entry in entries):
            return
        now = time.monotonic()
        with self._changed:
            behind = not request.is_first and self._ended > entries[0].arrived
            full = QueueFull(self._wait_s(now, self._queue.tokens)) if behind else None
        request.end(full or DeadlineExceeded())

    def _withdraw(self, entries: list[Entry[P, R]]) -> None:
        with self._changed:
            for entry in entries:
                self._queue.discard(entry)

    def _deliver(self, entries: list[Entry[P, R]], outcome: Outcome[R], batch: Batch, ended: float) -> None:
        """What comes in waits for the loop as long as what has `ended`."""
        now = time.monotonic()
        self._late.add(now, now - min(entry.request.foreseen for entry in entries) + now - ended)
        for entry, wait_s in zip(entries, batch.waits_s, strict=True):
            if entry.number in outcome.results:
                entry.request.put(entry.index, Done(outcome.results[entry.number], wait_s, batch.seconds))
            elif entry.number in outcome.errors:
                entry.request.end(ItemFailed(entry.index, outcome.errors[entry.number]))
        if self._seen is not None:
            self._seen(batch)

    # ---- on the thread

    def _work(self) -> None:
        while self._serve_next():
            pass

    def _serve_next(self) -> bool:
        """A function of its own, so that an idle thread holds on to nothing of the last batch. False: closed."""
        batch = self._next()
        if batch is None:
            return False
        started = time.monotonic()
        self._finish(batch, self._attempt(list(batch.rows.values())), started)
        return True

    def _next(self) -> Forming[Entry[P, R]] | None:
        """What is to run now; waits for it. None: closed."""
        with self._changed:
            while self._changed.wait_for(lambda: self._closed or self._queue.tokens) and self._queue.tokens:
                now = time.monotonic()
                batch: Forming[Entry[P, R]] = Forming(self._padded)
                for entry in self._queue.take(now, self._speed.spare()).rows.values():
                    if entry.is_wanted() and now < entry.deadline:
                        entry.has_started = True
                        batch.add(entry)
                if batch.rows:
                    self._running = (batch, now)
                    return batch
            return None

    def _attempt(self, entries: list[Entry[P, R]]) -> Outcome[R]:
        """Run a batch; where that fails, its halves: too much memory is asked for no more, one bad item fails alone."""
        outcome: Outcome[R] = Outcome({}, {})
        parts = [entries]
        while parts:
            part = [entry for entry in parts.pop() if entry.is_wanted()]
            if not part:
                continue
            try:
                outcome.results.update(self._run_part(part))
            except BaseException as error:  # a panic of a tokenizer's Rust is no Exception
                if len(part) > 1 and not isinstance(error, WrongCount):
                    parts += [part[len(part) // 2 :], part[: len(part) // 2]]
                    continue
                traceback.clear_frames(error.__traceback__)  # they hold the tensors that did not fit
                outcome.errors.update((entry.number, error) for entry in part)
        return outcome

    def _run_part(self, part: list[Entry[P, R]]) -> dict[int, R]:
        results = self._run([entry.item for entry in part])
        if len(results) != len(part):
            raise WrongCount(f"expected {len(part)} results, got {len(results)}")
        return {entry.number: result for entry, result in zip(part, results, strict=True)}

    def _finish(self, batch: Forming[Entry[P, R]], outcome: Outcome[R], started: float) -> None:
        entries, seconds = list(batch.rows.values()), time.monotonic() - started
        waits_s = tuple(started - entry.arrived for entry in entries)
        report = Batch(len(entries), batch.tokens, batch.cost(), waits_s, seconds, len(outcome.errors))
        with self._changed:
            self._running, self._ended = None, started + seconds
            self._busy_s += seconds
            self._last = batch.cost(), seconds
            if outcome.results:
                self._speed.add(batch.tokens, batch.cost(), seconds)
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop = entries[0].request.answer.get_loop()
            loop.call_soon_threadsafe(self._deliver, entries, outcome, report, started + seconds)
