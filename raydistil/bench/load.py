"""Requests at times that do not wait for answers (open loop, Poisson), and what became of them.

Latency counts from the moment a request was meant to be sent: a client that is late, or a server that makes it wait to
connect, is part of it (the coordinated omission of closed loops).
"""

import asyncio
import gc
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

NO_ANSWER = 0  # the status of a connection that failed or was given up
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
LONG_S = 0.02
SETTLED_S = 0.25  # a server that answers as fast has nothing left to do


@dataclass(frozen=True, slots=True)
class Plan:
    url: str
    bodies: tuple[bytes, ...]  # in turn
    rate: float  # requests a second
    seconds: float
    headers: dict[str, str]
    grace_s: float  # after the last request, for answers
    seed: int


@dataclass(frozen=True, slots=True)
class Measured:
    offered: float  # requests a second, as they were drawn
    served: float  # answers of 200 a second, within the time that requests were sent
    latencies_ms: tuple[float, ...]  # of answers of 200, however late
    statuses: dict[int, int]  # NO_ANSWER: none came


def put(plan: Plan) -> Measured:
    """Put a load on a server. Blocks; for a process of its own, which collects no garbage meanwhile: what that takes
    would count as the server's.
    """
    gc.disable()
    return asyncio.run(_put(plan))


class Answer(NamedTuple):
    status: int
    at: float


async def _put(plan: Plan) -> Measured:
    gaps = np.random.default_rng(plan.seed).exponential(1 / plan.rate, int(2 * plan.rate * plan.seconds) + 16)
    times = np.cumsum(gaps)
    times = times[times < plan.seconds]
    client, requests = Client(plan.url, plan.headers), list[asyncio.Task[Answer]]()
    bodies = [client.request(body) for body in plan.bodies]
    start = time.perf_counter() + 0.05
    for n, at in enumerate(times.tolist()):
        await _until(start + at)
        requests.append(asyncio.create_task(client.ask(bodies[n % len(bodies)])))
    await _ended(requests, max(0.0, start + plan.seconds - time.perf_counter()) + plan.grace_s)
    client.close()
    found = [
        (task.result().status, task.result().at - start - at, task.result().at)
        for task, at in zip(requests, times.tolist(), strict=True)
        if not task.cancelled()
    ]
    return _measured(plan, len(times), start, found)


async def _until(moment: float) -> None:
    """Sleeps end up to a millisecond late: the last of a long one is spent looking at the clock."""
    wait_s = moment - time.perf_counter()
    if wait_s > LONG_S:
        await asyncio.sleep(wait_s - 0.002)
        while time.perf_counter() < moment:
            await asyncio.sleep(0)
    elif wait_s > 0:
        await asyncio.sleep(wait_s)


async def _ended(tasks: list[asyncio.Task[Answer]], seconds: float) -> None:
    """Wait for so long; who is not done then is given up."""
    if not tasks:
        return
    _, late = await asyncio.wait(tasks, timeout=seconds)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)


def _measured(plan: Plan, asked: int, start: float, found: list[tuple[int, float, float]]) -> Measured:
    statuses = Counter(status for status, _, _ in found)
    statuses[NO_ANSWER] += asked - len(found)
    in_time = sum(status == 200 and done <= start + plan.seconds for status, _, done in found)
    latencies = tuple(1000 * taken for status, taken, _ in found if status == 200)
    return Measured(asked / plan.seconds, in_time / plan.seconds, latencies, dict(statuses))


# ---- before and after


def settle(url: str, body: bytes, within_s: float) -> None:
    """Wait until the server is idle: three requests in a row are answered at once. Raises RuntimeError: it is not."""
    asyncio.run(_settle(url, body, within_s))


async def _settle(url: str, body: bytes, within_s: float) -> None:
    until, quick, client = time.perf_counter() + within_s, 0, Client(url, {})
    while quick < 3:
        started = time.perf_counter()
        answer = await client.ask(client.request(body))
        taken_s = answer.at - started
        quick = quick + 1 if answer.status == 200 and taken_s < SETTLED_S else 0
        if time.perf_counter() > until:
            raise RuntimeError(
                f"expected {url} to answer within {within_s:g} s, got {answer.status} in {taken_s:.2f} s"
            )
        await asyncio.sleep(0.05)
    client.close()


# ---- a client that costs little, as it has the same cores as the servers


class Client:
    """HTTP/1.1, one request at a time on each of as many connections as are needed."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        parts = urlsplit(url)
        self._host, self._port, self._path = parts.hostname or "", parts.port or 80, parts.path or "/"
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._idle: list[Connection] = []

    def request(self, body: bytes) -> bytes:
        head = f"POST {self._path} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\n{self._headers}"
        return f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body

    async def ask(self, request: bytes) -> Answer:
        """NO_ANSWER where the connection fails. One that was kept may close as it is used again, which is no answer
        either: clients ask on a fresh one then.
        """
        while self._idle:
            kept = self._idle.pop()
            answer = await self._sent(kept, request) if kept.is_open() else None
            if answer is not None and (answer.status != NO_ANSWER or kept.has_read):
                return answer
        try:
            _, fresh = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
        except OSError:
            return Answer(NO_ANSWER, time.perf_counter())
        return await self._sent(fresh, request)

    async def _sent(self, connection: "Connection", request: bytes) -> Answer:
        try:
            answer = await connection.send(request)
        except asyncio.CancelledError:
            connection.close()
            raise
        if connection.is_open():
            self._idle.append(connection)
        return answer

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


class Connection(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self._transport, self._read, self._answer = transport, b"", asyncio.Future[Answer]()

    def send(self, request: bytes) -> asyncio.Future[Answer]:
        self._read, self._answer = b"", asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._read += data
        head, found, body = self._read.partition(b"\r\n\r\n")
        length = LENGTH.search(head) if found else None
        if length and len(body) >= int(length[1]):
            self._end(int(head[9:12]))

    def connection_lost(self, _: Exception | None) -> None:
        self._end(NO_ANSWER)

    def _end(self, status: int) -> None:
        if not self._answer.done():
            self._answer.set_result(Answer(status, time.perf_counter()))

    @property
    def has_read(self) -> bool:
        return bool(self._read)

    def is_open(self) -> bool:
        return not self._transport.is_closing()

    def close(self) -> None:
        self._transport.close()
