"""serve: find the model, check what can be checked, then run the app on Ray Serve until the user stops it.

Only the replicas load the model.
"""

import json
import logging
import math
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from raydistil.cluster import address_of, connected
from raydistil.config.cluster import ClusterConfig
from raydistil.errors import ModelError, PlanError, RaydistilError, StorageError
from raydistil.raylet import kept_in
from raydistil.serve.deployments import APP, BOARD, DEPLOYMENT, application, board, built
from raydistil.serve.ingress import speak_for_nobody, tuned
from raydistil.serve.offer import offered
from raydistil.serve.ports import free_port, url_of
from raydistil.serve.schema import ROUTES, Source
from raydistil.serve.served import Beside, Replicas, Served, Wishes
from raydistil.serve.source import SAYING, directory_of, find, version_of
from raydistil.storage import scratch_directory
from raydistil.types import Task

OBJECT_STORE_BYTES = 256 << 20  # of a local cluster; requests and replies are small
TOLD_S = 0.5  # that what Ray says of it takes to come
LOOK_S = 1.0  # between looks for a student that was exported anew, and for a canary that has to go
STOP = (signal.SIGINT, signal.SIGTERM)


def serve_forever(wishes: Wishes, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve a student until SIGINT or SIGTERM, then stop everything this started.

    Raises StorageError for a missing or broken model and RaydistilError for a port that cannot be had, both before
    Ray starts; PlanError for a cluster that cannot hold the replicas; ModelError where a replica cannot load its model.
    """
    wanted = offered(wishes)
    run_dir = Path(wishes.run_dir)
    cluster = ClusterConfig(object_store_bytes=OBJECT_STORE_BYTES)
    if port == 0 or address_of(cluster) is None:
        port = free_port(host, port)
    # SystemExit: what Ray's own handler makes of a SIGTERM that comes before ours is in place.
    ingress = tuned() if address_of(cluster) is None else nullcontext()
    with suppress(KeyboardInterrupt, SystemExit), ExitStack() as copies, ingress, connected(cluster):
        _stop_on_signals()
        served, source = _kept(wanted, copies, say), wanted.source
        check_cluster(served.replicas, served.replicas.most + len(served.beside.sources()))
        with serve_ended(), serving(served, host, port):
            url = url_of(host, port)
            say(f"serving {source.name} at {url} (try: {example(source, url)})")
            _watch(run_dir, served, copies, say)
            say("stopping: requests under way are answered first")
    say(f"stopped serving {wanted.source.name}")


# ---- before Ray starts


def config_file(wishes: Wishes, host: str, port: int) -> str:
    """YAML that `serve deploy` takes, on a cluster where the same paths lead to the same files.

    Raises what `offered` does of what is there now.
    """
    offered(wishes)
    paths = {name: getattr(wishes, name) for name in ("run_dir", "keys", "teacher", "canary")}
    args = asdict(wishes) | {name: str(Path(path).resolve()) for name, path in paths.items() if path is not None}
    app = {"name": APP, "route_prefix": "/", "import_path": f"{built.__module__}:{built.__name__}", "args": args}
    whole = {"proxy_location": "HeadOnly", "http_options": {"host": host, "port": port}, "applications": [app]}
    return str(yaml.safe_dump(whole, sort_keys=False))


def example(source: Source, url: str) -> str:
    """A request to paste into a shell."""
    pair = {"text": "How do I open a file?", "text_pair": "Open a file and return a stream."}
    asked: dict[Task, dict[str, Any]] = {
        "classification": {"inputs": pair if (source.report or {}).get("pairs") else pair["text"]},
        "regression": {"inputs": pair if (source.report or {}).get("pairs") else pair["text"]},
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


def check_cluster(each: Replicas, count: int) -> None:
    """Raises PlanError where the cluster is too small for so many replicas, or Serve is in use on it."""
    import ray
    from ray import serve

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, wanted in (("CPU", each.cpus), ("GPU", each.gpus)):
        has = [node.get(name, 0) for node in nodes]
        if wanted and sum(holds(amount, wanted) for amount in has) < count:
            raise PlanError(
                f"expected {wanted:g} {name} for each of {count} replicas, found {sum(has):g}: lower --replicas or "
                f"--{name.lower()}s"
            )
    if serve.status().proxies:
        raise PlanError("expected a cluster without Ray Serve, it runs there already: end it with serve shutdown")


def holds(amount: float, wanted: float) -> int:
    """How often `wanted` is in `amount`, to Ray's precision: 1.0 // 0.2 is 4."""
    return math.floor(amount / wanted + 1e-4)


@contextmanager
def serving(served: Served, host: str, port: int) -> Iterator[None]:
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
    _deploy(served)
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


def _deploy(served: Served) -> None:
    """Returns when the first replica answers."""
    from ray import serve

    try:
        serve.run(application(served), name=APP, route_prefix="/")
    except RuntimeError as error:
        raise _unloadable(served) from error


def _unloadable(served: Served) -> ModelError:
    """Which of the models it is, and why."""
    from ray import serve

    found = serve.status().applications[APP].deployments
    beside = {str(name): source for name, source in served.beside.sources().items()}
    name = next((name for name in beside if found[name].status == "DEPLOY_FAILED"), DEPLOYMENT)
    directory = beside.get(name, served.source).directory
    return ModelError(f"expected a replica to load {directory}, it failed: {_cause(found[name].message)}")


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


def _kept(served: Served, copies: ExitStack, say: Callable[[str], None]) -> Served:
    """With a copy of the student, as it is now, for replicas that start when there is another one in its place.

    Where there can be none, that is said, and it is read where it is. Raises StorageError where it changed meanwhile.
    """
    directory = Path(served.source.directory)
    with ExitStack() as copying:
        try:
            copy = copying.enter_context(scratch_directory(directory)) / directory.name
            shutil.copytree(directory, copy)
        except OSError as error:
            say(f"no copy of {directory} can be kept: replicas that start later load what is there then ({error})")
            return served
        if version_of(copy) != served.source.version:
            raise StorageError(f"expected {directory} to stay as it is while it is read, it changed: start again")
        copies.push(copying.pop_all())
    return replace(served, source=replace(served.source, kept=str(copy)))


def _watch(run_dir: Path, served: Served, copies: ExitStack, say: Callable[[str], None]) -> None:
    """Until the user stops it. A student that is exported anew takes over from the one that is served, which answers
    what it was asked first; one that cannot be served is told of, and the served one stays. A canary that has to go
    gives its replicas back.
    """
    tried = seen = _stamp(run_dir)
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(LOOK_S)
            _touch(served.source.kept)
            served = _without_bad_canary(served, say)
            before, seen = seen, _stamp(run_dir)
            if seen not in (tried, None) and seen == before:  # else it may still be written
                tried = seen
                served = _swapped(run_dir, served, copies, say)


def _touch(copy: str | None) -> None:
    """Another machine's raydistil removes what nobody has touched for a day."""
    if copy is not None:
        with suppress(OSError):
            os.utime(Path(copy).parent)


def _without_bad_canary(served: Served, say: Callable[[str], None]) -> Served:
    import ray

    canary = served.beside.canary
    reason = ray.get(board().verdict.remote(canary.source.version)) if canary else None
    if canary is None or reason is None:
        return served
    say(f"canary {canary.source.directory} is rolled back: {reason}")
    try:
        _deploy(served.without_canary())
    except ModelError as error:
        say(f"error: {error}; the canary is not asked any more, and keeps its replicas")
    return served.without_canary()


def _stamp(run_dir: Path) -> tuple[tuple[int, int, int], ...] | None:
    """Changes with every export, and with every file that is written; None where one is not there just now."""
    with suppress(OSError):
        found = [(directory_of(run_dir) / name).stat() for name in SAYING]
        return tuple((each.st_ino, each.st_mtime_ns, each.st_size) for each in found)
    return None


def _swapped(run_dir: Path, served: Served, copies: ExitStack, say: Callable[[str], None]) -> Served:
    """What is served now."""
    source = served.source
    try:
        fresh = replace(find(run_dir), backend=source.backend, keys=source.keys)
        if fresh == replace(source, kept=None):
            return served
        say(f"{source.name} was exported anew: loading {fresh.version[:12]}")
        beside = _with_cascade_of(run_dir, served.beside, say)
        wanted = _kept(replace(served, source=fresh, beside=beside), copies, say)
        _deploy_or_back(wanted, served)
    except RaydistilError as error:
        say(f"error: {error}; the one that was served before still is")
        return served
    say(f"serving {source.name} {fresh.version[:12]} in place of {source.version[:12]}")
    if source.kept is not None:
        shutil.rmtree(source.kept, ignore_errors=True)
    return wanted


def _deploy_or_back(wanted: Served, before: Served) -> None:
    """Raises ModelError where it does not load; what was served before is then what Serve is told to serve."""
    try:
        _deploy(wanted)
    except ModelError:
        _deploy(before)  # else no replica of it would be started any more
        raise


def _with_cascade_of(run_dir: Path, beside: Beside, say: Callable[[str], None]) -> Beside:
    """The cascade, where there is one, of the student that is there now: it is as sure as it is."""
    if beside.cascade is None or beside.teacher is None:
        return beside
    from raydistil.serve.cascade import cascade_of

    teacher = Path(beside.teacher.directory)
    return replace(beside, cascade=cascade_of(run_dir, teacher, beside.cascade.wanted, say))
