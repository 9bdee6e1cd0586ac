"""The load of `bench serve`: as many requests as were drawn, when they were meant to come, and what became of each."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from served import running

from raydistil.bench.load import NO_ANSWER, Plan, put, settle
from raydistil.serve.ports import free_port, url_of


def planned(url: str, rate: float, seconds: float, **more: Any) -> Plan:
    given: dict[str, Any] = {"bodies": (b'{"n": 1}', b'{"n": 2}'), "headers": {}, "grace_s": 5.0, "seed": 3, **more}
    return Plan(f"{url}/asked", rate=rate, seconds=seconds, **given)


def answering(answer: Callable[[int], tuple[float, int]]) -> tuple[FastAPI, list[tuple[float, bytes, str]]]:
    """An app that waits and answers as `answer` has it for the n-th request, and what it was asked, when."""
    app, seen = FastAPI(), list[tuple[float, bytes, str]]()

    @app.post("/asked")
    async def asked(request: Request) -> Response:
        seen.append((time.perf_counter(), await request.body(), request.headers.get("x-deadline-ms", "")))
        wait_s, status = answer(len(seen))
        await asyncio.sleep(wait_s)
        return Response(b"said", status)

    return app, seen


def test_every_request_is_sent_in_turn_and_counted_by_its_status() -> None:
    app, seen = answering(lambda n: (0.0, 429 if n % 4 == 0 else 200))
    with running(app) as url:
        settle(f"{url}/asked", b"{}", 20)
        seen.clear()
        done = put(planned(url, 100, 2, headers={"x-deadline-ms": "7"}))
    assert sum(done.statuses.values()) == len(seen) == done.offered * 2 and 140 < len(seen) < 260
    assert done.statuses == {200: len(seen) - len(seen) // 4, 429: len(seen) // 4, NO_ANSWER: 0}
    bodies = Counter(body for _, body, _ in seen)  # in turn: but two that are on their way at once may come either way
    assert bodies == {b'{"n": 1}': (len(seen) + 1) // 2, b'{"n": 2}': len(seen) // 2}
    assert {header for _, _, header in seen} == {"7"} and len(done.latencies_ms) == done.statuses[200]


def test_the_same_seed_is_the_same_load() -> None:
    app, _ = answering(lambda n: (0.0, 200))
    with running(app) as url:
        offered = [put(planned(url, 50, 1, seed=seed)).offered for seed in (1, 1, 2)]
    assert offered[0] == offered[1] != offered[2]


def test_a_slow_server_does_not_slow_the_load_and_what_is_late_does_not_count_as_served() -> None:
    """Each takes a second and a half: none is served within the second of the load, all are answered after it."""
    app, seen = answering(lambda n: (1.5, 200))
    with running(app) as url:
        done = put(planned(url, 40, 1))
    assert done.statuses == {200: len(seen), NO_ANSWER: 0} and done.served == 0 and min(done.latencies_ms) >= 1500
    assert seen[-1][0] - seen[0][0] < 1.5  # a closed loop would still be at the first


def test_who_is_not_answered_in_time_is_given_up() -> None:
    app, seen = answering(lambda n: (0.0 if n == 1 else 3.0, 200))
    with running(app) as url:
        done = put(planned(url, 20, 1, grace_s=0.2))
    assert done.statuses == {200: 1, NO_ANSWER: len(seen) - 1} and len(seen) > 5


def test_nobody_there_is_no_answer() -> None:
    url = url_of("127.0.0.1", free_port("127.0.0.1", 0))
    done = put(planned(url, 20, 0.5))
    assert set(done.statuses) == {NO_ANSWER} and done.served == 0 and done.latencies_ms == ()
    with pytest.raises(RuntimeError, match=r"expected http://127.0.0.1:\d+ to answer within 0.2 s, got 0"):
        settle(url, b"{}", 0.2)
