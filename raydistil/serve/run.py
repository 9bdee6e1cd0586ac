"""serve: find the model, check what can be checked, then run the app on Ray Serve until the user stops it.

Only the replicas load the model.
"""

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from raydistil.cluster import address_of, connected
from raydistil.config.cluster import ClusterConfig
from raydistil.errors import ModelError, PlanError, RaydistilError
from raydistil.raylet import kept_in
from raydistil.serve.ingress import speak_for_nobody, tuned
from raydistil.serve.keys import read_keys
from raydistil.serve.metrics import Board, Families
from raydistil.serve.ports import free_port, url_of
from raydistil.serve.scaling import Stats, settings
from raydistil.serve.schema import ROUTES, Source, Wish
from raydistil.serve.source import WEIGHTS, directory_of, find
from raydistil.types import Task

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

APP, DEPLOYMENT, BOARD = "raydistil", "student", "metrics"
OBJECT_STORE_BYTES = 256 << 20  # of a local cluster; requests and replies are small
TOLD_S = 0.5  # that what Ray says of it takes to come
LOOK_S = 1.0  # between looks for a student that was exported anew
STOP = (signal.SIGINT, signal.SIGTERM)
MAX_ONGOING = 4096  # requests of one replica, waiting ones included: its own bound, in tokens, is to be the first


@dataclass(frozen=True, slots=True)
class Replicas:
    least: int
    most: int
    calm_s: float = 60.0  # as long must fewer be enough


def serve_forever(
    run_dir: Path, host: str, port: int, replicas: Replicas, say: Callable[[str], None], backend: Wish = "auto",
    keys: Path | None = None,
) -> None:  # fmt: skip
    """Serve the student of `run_dir` until SIGINT or SIGTERM, then stop everything this started.

    Raises StorageError for a missing or broken model and RaydistilError for a port that cannot be had, both before
    Ray starts; PlanError for a cluster that cannot hold `replicas`; ModelError where a replica cannot load the model.
    """
    known = () if keys is None else tuple((key.name, key.hash, key.rate) for key in read_keys(keys))
    source = replace(find(run_dir), backend=backend, keys=known)
    cluster = ClusterConfig(object_store_bytes=OBJECT_STORE_BYTES)
    if port == 0 or address_of(cluster) is None:
        port = free_port(host, port)
    # SystemExit: what Ray's own handler makes of a SIGTERM that comes before ours is in place.
    ingress = tuned() if address_of(cluster) is None else nullcontext()
    with suppress(KeyboardInterrupt, SystemExit), ingress, connected(cluster):
        _stop_on_signals()
        check_cluster(replicas.most)
        with serve_ended(), serving(source, host, port, replicas):
            url = url_of(host, port)
            say(f"serving {source.name} at {url} (try: {example(source, url)})")
            _versions(run_dir, source, replicas, say)
            say("stopping: requests under way are answered first")
    say(f"stopped serving {source.name}")


# ---- before Ray starts


def example(source: Source, url: str) -> str:
    """A request to paste into a shell."""
    asked: dict[Task, dict[str, str]] = {
        "classification": {"inputs": "How do I open a file?"},
        "token_classification": {"inputs": "Ada Lovelace lived in London."},
        "question_answering": {"question": "Where did she live?", "context": "Ada Lovelace lived in London."},
        "embedding": {"input": "How do I open a file?"},
        "mlm": {"inputs": f"Paris is the {source.mask_token} of France."},
    }
    if source.task == "mlm" and source.mask_token is None:
        return f"curl {url}/info"
    body = json.dumps(asked[source.task])
    return f"curl {url}{ROUTES[source.task]} -H 'content-type: application/json' -d '{body}'"


# ---- on Ray


class Student:
    """One replica: the model and the app around it. Serve itself asks for the app, and for what there is to do."""

    def __init__(self, source: Source) -> None:
        from ray import serve

        from raydistil.serve.apart import choose_apart
        from raydistil.serve.model import load

        self._name = serve.get_replica_context().replica_id.unique_id
        self._stats, self._board = Stats(), board()
        self._model = load(source, 1, self._name, choose_apart)  # one thread: a replica is one CPU to Ray
        threading.Thread(target=self._end_with_model, daemon=True).start()

    def __serve_build_asgi_app__(self) -> "FastAPI":
        from raydistil.serve.app import build_api

        return build_api(self._model, self._gather)

    async def _gather(self, families: Families) -> list[Families]:
        made: list[Families] = await self._board.show.remote(self._name, families)
        return made

    def _end_with_model(self) -> None:
        """Where the model's process dies, at once: what it had is asked of another replica, with no 500 between."""
        backend: Any = self._model.backend
        backend.wait()
        os._exit(1)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        load = self._model.batcher.load()
        self._board.show.remote(self._name, self._model.meter.families(load))
        return self._stats.now(load)


def board() -> Any:
    """The actor on which replicas show their counts."""
    import ray

    kept: Any = ray.remote(num_cpus=0)(Board)
    return kept.options(name=BOARD, namespace=APP, lifetime="detached", get_if_exists=True).remote()


def application(source: Source, replicas: Replicas) -> "Application":
    """The Serve application: one deployment."""
    from ray import serve

    deployment: Any = serve.deployment(
        serve.ingress()(Student),
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=MAX_ONGOING,
        autoscaling_config=settings(replicas.least, replicas.most, replicas.calm_s),
        max_surge_percent=100,
        health_check_period_s=10,
        health_check_timeout_s=60,
    )
    bound: Application = deployment.bind(source)
    return bound


def check_cluster(replicas: int) -> None:
    """Raises PlanError where the cluster is too small for `replicas`, or Serve is in use on it."""
    import ray
    from ray import serve

    cpus = ray.cluster_resources().get("CPU", 0)
    if replicas > cpus:
        raise PlanError(f"expected a CPU for each of {replicas} replicas, found {cpus:g}: lower --replicas")
    if serve.status().proxies:
        raise PlanError("expected a cluster without Ray Serve, it runs there already: end it with serve shutdown")


@contextmanager
def serving(source: Source, host: str, port: int, replicas: Replicas) -> Iterator[None]:
    """The app answers at host:port inside the block, and is deleted after it. Ray must be connected; Serve is started.

    Raises ModelError where the model does not load, RaydistilError where the cluster cannot listen there.
    """
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # its import sets the level to INFO
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    except RuntimeError as error:
        raise RaydistilError(f"expected a port to listen on: {_cause(str(error))} Choose one with --port") from error
    speak_for_nobody(ray.get_runtime_context().get_node_id())
    _deploy(source, replicas)
    try:
        yield
    finally:
        if _ray_lives():
            serve.delete(APP)


@contextmanager
def serve_ended() -> Iterator[None]:
    """Serve is shut down after the block: with a cluster that was started here its HAProxy would not end."""
    import ray
    from ray import serve

    try:
        yield
    finally:
        if _ray_lives():
            with kept_in(Path(os.devnull)):  # that Serve's controller does not live through its own end
                serve.shutdown()
                with suppress(ValueError):  # no replica had come up
                    ray.kill(ray.get_actor(BOARD, namespace=APP))
                time.sleep(TOLD_S)


def _ray_lives() -> bool:
    """False where the SIGTERM that stops this process went to Ray's too (systemd, timeout): it would wait a minute."""
    import ray

    time.sleep(0.5)  # the time Ray takes to die of it
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
        return True
    return False


def _deploy(source: Source, replicas: Replicas) -> None:
    """Returns when the first replica answers."""
    from ray import serve

    try:
        serve.run(application(source, replicas), name=APP, route_prefix="/")
    except RuntimeError as error:
        reason = _cause(serve.status().applications[APP].deployments[DEPLOYMENT].message)
        raise ModelError(f"expected a replica to load {source.directory}, it failed: {reason}") from error


def _cause(traceback: str) -> str:
    """The last line: what went wrong on another process, without the way it came."""
    return traceback.strip().rpartition("\n")[2]


# ---- until the user stops it


def _stop_on_signals() -> None:
    """SIGINT and SIGTERM raise KeyboardInterrupt, once.

    To be called after Ray is connected: Ray's own handler of SIGTERM kills the cluster under a Serve that still runs.
    """
    for number in STOP:
        signal.signal(number, _stop)


def _stop(_: int, __: FrameType | None) -> None:
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C would leave processes behind
    raise KeyboardInterrupt


def _versions(run_dir: Path, source: Source, replicas: Replicas, say: Callable[[str], None]) -> None:
    """Until the user stops it. A student that is exported anew takes over from the one that is served, which answers
    what it was asked first; one that cannot be served is told of, and the served one stays.
    """
    before = _stamp(run_dir)
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(LOOK_S)
            if (now := _stamp(run_dir)) not in (before, None):
                before = now
                source = _swapped(run_dir, source, replicas, say)


def _stamp(run_dir: Path) -> tuple[int, int] | None:
    """Changes with every export; None where there is none just now."""
    with suppress(OSError):
        found = (directory_of(run_dir) / WEIGHTS).stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _swapped(run_dir: Path, source: Source, replicas: Replicas, say: Callable[[str], None]) -> Source:
    """What is served now."""
    try:
        fresh = replace(find(run_dir), backend=source.backend, keys=source.keys)
        if fresh == source:
            return source
    except RaydistilError as error:
        say(f"error: {error}; the one that was served before still is")
        return source
    say(f"{source.name} was exported anew: loading {fresh.version[:12]}")
    try:
        _deploy(fresh, replicas)
    except ModelError as error:
        _deploy(source, replicas)  # its replicas are there: Serve takes them for what is wanted again
        say(f"error: {error}; the one that was served before still is")
        return source
    say(f"serving {source.name} {fresh.version[:12]} in place of {source.version[:12]}")
    return fresh
