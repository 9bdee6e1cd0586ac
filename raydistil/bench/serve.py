"""bench serve: what batches that the device asks for are worth, against the same model without them.

Three servers on the same cores: raydistil's app, a plain one with `@serve.batch` (both on Ray Serve behind one
HAProxy), and a plain one on uvicorn, a text at a time. Same weights, reader, backend and threads; see `arms`. In every
round each rate is offered to the servers in turn, from another process (see `load`). Ratios are taken within a round;
medians over the rounds are reported. Idle latency is compared with the backend called in process, as often as requests
come then.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from raydistil.bench import MINILM
from raydistil.bench.inprocess import Asked, alone_ms, asked
from raydistil.bench.load import NO_ANSWER, Measured, Plan, put, settle
from raydistil.bench.processes import in_a_process
from raydistil.cluster import connected
from raydistil.config.cluster import ClusterConfig
from raydistil.config.student import StudentConfig
from raydistil.errors import ConfigError
from raydistil.models import load_model, resolve
from raydistil.prepare import Say
from raydistil.serve.ingress import tuned
from raydistil.serve.ports import free_port, url_of
from raydistil.serve.run import check_cluster, serve_ended, serving
from raydistil.serve.schema import ROUTES, Source, Wish
from raydistil.serve.served import Beside, Hardware, Replicas, Served
from raydistil.serve.source import find
from raydistil.storage import whole_directory
from raydistil.student import build_student, save_model

HOST = "127.0.0.1"
REPLICA = "ray::ServeReplica:raydistil:student"  # the title of its process
APP, BATCHED, BARE, PEER = "raydistil", "serve.batch", "fastapi", "peer"
SHARES = (0.05, 0.5, 0.8, 1.0, 1.3, 2.0)  # of the app's saturation that are offered
FIRST_S, FIRST = 4.0, 100.0  # of each load by which it is found; a second
LOADED_S = 120.0
FIELDS = {"classification": "inputs", "embedding": "input"}  # of the requests that carry one text
Tree = dict[str, Any]
Round = dict[str, list[Measured]]  # of each server, what it did at each of SHARES


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured, and how much of it."""

    run_dir: Path | None  # None: three layers of MiniLM with a head at random
    output: Path
    backend: Wish
    replicas: int  # of each server
    cpus: int  # of each replica: the threads of its model
    rounds: int
    seconds: float  # of each load
    deadline_ms: float  # that the app is told
    soak_s: float  # of steady load in the end, while the replica's memory is watched
    peer: str | None  # where another server embeds texts, as OpenAI's does


@dataclass(frozen=True, slots=True)
class Arm:
    name: str
    url: str
    headers: dict[str, str]


def bench_serve(setting: Setting, say: Say) -> Tree:
    """The table; see the module. Raises StorageError and ConfigError for a model that it cannot serve."""
    source = replace(find(setting.run_dir or student(setting.output)), backend=setting.backend)
    if source.task not in FIELDS or (setting.peer and source.task != "embedding"):
        wanted = "embedding" if setting.peer else " or ".join(FIELDS)
        raise ConfigError(f"bench serve: expected a model of task {wanted}, got {source.task}: serve another one")
    hardware = Hardware(setting.cpus)
    given = in_a_process(asked, source, hardware)
    source = replace(source, backend=given.backend)
    say(f"{source.name} with {given.backend}: {given.mean_tokens:.1f} tokens a text in the mean")
    bodies = tuple(json.dumps({FIELDS[source.task]: text, **_named(source)}).encode() for text in given.texts)
    with ExitStack() as stack:
        arms = [*stack.enter_context(_on_serve(setting, source)), stack.enter_context(_on_uvicorn(setting, source))]
        arms += [Arm(PEER, setting.peer, {})] if setting.peer else []
        _settle(arms, bodies)
        top = _first(arms[0], bodies)
        say(f"{APP} serves {top:.0f} requests a second when it is asked for more")
        rounds, alone = list[Round](), list[float]()
        for number in range(setting.rounds):
            _settle(arms, bodies)
            alone.append(
                in_a_process(alone_ms, source, hardware, given.texts, SHARES[0] * top, setting.seconds, number)
            )
            rounds.append(_round(setting, arms, bodies, top, number, say))
        _settle(arms, bodies)
        memory = _soak(setting, arms[0], bodies, top) if setting.soak_s else {}
    return _result(setting, source, given, rounds, alone) | memory


def _named(source: Source) -> dict[str, str]:
    return {"model": source.name} if source.task == "embedding" else {}


def student(output: Path) -> Path:
    """Every other layer of MiniLM, with a head at random: how fast it is does not hang on what it learnt."""
    path = output / "student-minilm"
    if not path.exists():
        teacher = load_model(MINILM, "classification", ("one", "another"))
        with whole_directory(path) as scratch:
            student = build_student(teacher, StudentConfig(layers=(0, 2, 4)), "classification")
            save_model(student, resolve(MINILM), scratch)
    return path


# ---- the servers


@contextmanager
def _on_serve(setting: Setting, source: Source) -> Iterator[list[Arm]]:
    """The app, and its twin with `@serve.batch`."""
    port = free_port(HOST, 0)
    url = url_of(HOST, port)
    with tuned(), connected(ClusterConfig(object_store_bytes=256 << 20)), serve_ended():
        from ray import serve

        from raydistil.bench.arms import batched

        replicas = Replicas(setting.replicas, setting.replicas, cpus=setting.cpus)
        check_cluster(replicas, setting.replicas)
        with serving(Served(source, replicas, Beside()), HOST, port):
            serve.run(batched(source, replicas), name=BATCHED, route_prefix="/batched")
            yield [
                Arm(APP, url + ROUTES[source.task], {"x-deadline-ms": f"{setting.deadline_ms:g}"}),
                Arm(BATCHED, f"{url}/batched{ROUTES[source.task]}", {}),
            ]


@contextmanager
def _on_uvicorn(setting: Setting, source: Source) -> Iterator[Arm]:
    from raydistil.bench.arms import CPUS, SOURCE

    port = free_port(HOST, 0)
    command = [
        sys.executable, "-m", "uvicorn", "raydistil.bench.arms:bare", "--factory", "--workers", str(setting.replicas),
        "--host", HOST, "--port", str(port), "--no-access-log", "--log-level", "warning",
    ]  # fmt: skip
    told = {SOURCE: json.dumps(asdict(source)), CPUS: str(setting.cpus)}
    process = psutil.Popen(command, env=os.environ | told, stdout=subprocess.DEVNULL)
    try:
        yield Arm(BARE, url_of(HOST, port) + ROUTES[source.task], {})
    finally:
        for each in [process, *process.children(recursive=True)]:
            each.terminate()
        process.wait()


# ---- loads


def _put(arm: Arm, bodies: tuple[bytes, ...], rate: float, seconds: float, grace_s: float, seed: int) -> Measured:
    return in_a_process(put, Plan(arm.url, bodies, rate, seconds, arm.headers, grace_s, seed))


def _settle(arms: list[Arm], bodies: tuple[bytes, ...]) -> None:
    """One that was asked too much goes on for those who have left, on the cores of the next."""
    for arm in arms:
        settle(arm.url, bodies[0], LOADED_S)


def _first(app: Arm, bodies: tuple[bytes, ...]) -> float:
    """Requests a second that the app serves when it is asked for many more."""
    rate = FIRST
    while (served := _put(app, bodies, rate, FIRST_S, 1.0, 0).served) > 0.7 * rate:
        rate *= 2
    return served


def _round(setting: Setting, arms: list[Arm], bodies: tuple[bytes, ...], top: float, number: int, say: Say) -> Round:
    """Who is first changes with the rate."""
    found: Round = {arm.name: [] for arm in arms}
    for step, share in enumerate(SHARES):
        turn = (number + step) % len(arms)
        for arm in arms[turn:] + arms[:turn]:
            _settle(arms, bodies)
            done = _put(arm, bodies, share * top, setting.seconds, setting.deadline_ms / 1000, 100 * number + step)
            found[arm.name].append(done)
            p50, p99 = _percentiles(done, 50, 99)
            say(
                f"round {number + 1}, {arm.name}: {done.offered:.0f}/s offered, {done.served:.0f} served, "
                f"p50 {p50:.0f} ms, p99 {p99:.0f} ms, {done.statuses.get(429, 0)} refused"
            )
    return found


def _soak(setting: Setting, app: Arm, bodies: tuple[bytes, ...], top: float) -> Tree:
    """MiB that replicas and their models hold, minute by minute or ten times, under four fifths of what the app can."""
    named = ((process, " ".join(process.info["cmdline"] or [])) for process in psutil.process_iter(["cmdline"]))
    replicas = [process for process, name in named if name.startswith(REPLICA)]
    held_by = [each for replica in replicas for each in (replica, *replica.children(recursive=True))]
    parts = max(10, round(setting.soak_s / 60))
    held, errors = [], 0
    for part in range(parts):
        done = _put(app, bodies, 0.8 * top, setting.soak_s / parts, setting.deadline_ms / 1000, part)
        errors += _errors(done)
        held.append(round(sum(each.memory_info().rss for each in held_by) / 2**20, 1))
    return {"soak": {"seconds": setting.soak_s, "replica_mib": held, "errors_5xx": errors}}


# ---- the table


def _percentiles(done: Measured, *which: float) -> list[float]:
    found: list[float] = np.percentile(done.latencies_ms or (np.nan,), which).tolist()
    return found


def _errors(done: Measured) -> int:
    return sum(count for status, count in done.statuses.items() if status >= 500)


def _result(setting: Setting, source: Source, given: Asked, rounds: list[Round], alone: list[float]) -> Tree:
    app = [turn[APP] for turn in rounds]
    idle = [_percentiles(done[0], 50)[0] - own for done, own in zip(app, alone, strict=True)]
    return {
        "model": source.name, "task": source.task, "backend": given.backend, "mean_tokens": given.mean_tokens,
        "replicas": setting.replicas, "cpus": setting.cpus, "rounds": setting.rounds, "seconds": setting.seconds,
        "deadline_ms": setting.deadline_ms, "in_process_p50_ms": statistics.median(alone),
        "rates": _arm(app)["rates"], "arms": {name: _arm([turn[name] for turn in rounds]) for name in rounds[0]},
        "saturation_rps": statistics.median(map(_top, app)),
        **{f"ratio_vs_{name.replace('.', '_')}": _ratio(rounds, name) for name in rounds[0] if name != APP},
        "errors_5xx": sum(_errors(done) for turn in app for done in turn),
        "served_at_2x_fraction": statistics.median(turn[-1].served / _top(turn) for turn in app),
        "p99_at_2x_ms": statistics.median(_percentiles(turn[-1], 99)[0] for turn in app),
        "overhead_p50_ms": statistics.median(idle),
    }  # fmt: skip


def _top(turn: list[Measured]) -> float:
    return max(done.served for done in turn)


def _ratio(rounds: list[Round], name: str) -> float:
    return statistics.median(_top(turn[APP]) / _top(turn[name]) for turn in rounds)


def _arm(turns: list[list[Measured]]) -> Tree:
    rates = [_rate([turn[step] for turn in turns], share) for step, share in enumerate(SHARES)]
    return {"saturation_rps": statistics.median(map(_top, turns)), "rates": rates}


def _rate(done: list[Measured], share: float) -> Tree:
    """One server at one rate."""
    p50, p95, p99 = (statistics.median(_percentiles(each, which)[0] for each in done) for which in (50, 95, 99))
    return {
        "share": share, "offered": statistics.median(each.offered for each in done),
        "served": statistics.median(each.served for each in done), "p50_ms": p50, "p95_ms": p95, "p99_ms": p99,
        "rejected": sum(each.statuses.get(429, 0) for each in done),
        "unanswered": sum(each.statuses.get(NO_ANSWER, 0) for each in done),
        "errors_5xx": sum(map(_errors, done)),
    }  # fmt: skip
