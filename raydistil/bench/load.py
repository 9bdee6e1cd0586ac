"""Requests at times that do not wait for answers (open loop, Poisson), and what became of them.

Latency counts from the moment a request was meant to be sent: a client that is late, or a server that makes it wait to
connect, is part of it (the coordinated omission of closed loops).
"""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass

import aiohttp
import numpy as np

NO_ANSWER = 0  # the status of a connection that failed or was given up
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
    """Put a load on a server. Blocks; for a process of its own."""
    return asyncio.run(_put(plan))


async def _put(plan: Plan) -> Measured:
    gaps = np.random.default_rng(plan.seed).exponential(1 / plan.rate, int(2 * plan.rate * plan.seconds) + 16)
    times = np.cumsum(gaps)
    times = times[times < plan.seconds]
    found: list[tuple[int, float, float]] = []  # status, latency, when it was done
    async with aiohttp.ClientSession(
        headers={"content-type": "application/json", **plan.headers},
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        timeout=aiohttp.ClientTimeout(total=None),
    ) as session:
        start = time.perf_counter() + 0.05
        tasks = []
        for n, at in enumerate(times.tolist()):
            wait_s = start + at - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            body = plan.bodies[n % len(plan.bodies)]
            tasks.append(asyncio.create_task(_one(session, plan.url, body, start + at, found)))
        await _ended(tasks, max(0.0, start + plan.seconds - time.perf_counter()) + plan.grace_s)
    return _measured(plan, len(times), start, found)


async def _one(
    session: aiohttp.ClientSession, url: str, body: bytes, meant: float, found: list[tuple[int, float, float]]
) -> None:  # fmt: skip
    status = await _status(session, url, body)
    done = time.perf_counter()
    found.append((status, done - meant, done))


async def _ended(tasks: list[asyncio.Task[None]], seconds: float) -> None:
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
    until, quick = time.perf_counter() + within_s, 0
    async with aiohttp.ClientSession(headers={"content-type": "application/json"}) as session:
        while quick < 3:
            started = time.perf_counter()
            status = await _status(session, url, body)
            taken_s = time.perf_counter() - started
            quick = quick + 1 if status == 200 and taken_s < SETTLED_S else 0
            if time.perf_counter() > until:
                raise RuntimeError(f"expected {url} to answer within {within_s:g} s, got {status} in {taken_s:.2f} s")
            await asyncio.sleep(0.05)


async def _status(session: aiohttp.ClientSession, url: str, body: bytes) -> int:
    try:
        async with session.post(url, data=body) as response:
            await response.read()
            return response.status
    except aiohttp.ClientError:
        return NO_ANSWER
