"""serve: find the model, check what can be checked, then run the app on Ray Serve until the user stops it.

Only the replicas load the model.
"""

import json
import logging
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

from safetensors import SafetensorError, safe_open

from raydistil import rundir
from raydistil.cluster import address_of, connected
from raydistil.config.cluster import ClusterConfig
from raydistil.errors import ModelError, PlanError, RaydistilError, StorageError
from raydistil.serve.ingress import tuned
from raydistil.serve.keys import read_keys
from raydistil.serve.metrics import Board, Families
from raydistil.serve.ports import free_port, url_of
from raydistil.serve.scaling import Stats, settings
from raydistil.serve.schema import ROUTES, Source, Wish
from raydistil.types import SENTENCE_LAYOUT, Task

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

TOKENIZER, SETTINGS, WEIGHTS = "tokenizer.json", "tokenizer_config.json", "model.safetensors"
REPORT = "raydistil.json"
HEADS: dict[str, Task] = {
    "ForSequenceClassification": "classification", "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering", "ForMaskedLM": "mlm",
}  # fmt: skip
CAUSAL = ("ForCausalLM", "LMHeadModel")
APP, DEPLOYMENT, BOARD = "raydistil", "student", "metrics"
OBJECT_STORE_BYTES = 256 << 20  # of a local cluster; requests and replies are small
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
            _wait()
            say("stopping: requests under way are answered first")
    say(f"stopped serving {source.name}")


# ---- before Ray starts


def find(run_dir: Path) -> Source:
    """The model of a run's directory, or in a directory of its own. Raises StorageError: none, incomplete, no task."""
    student = run_dir / rundir.STUDENT
    directory = student if student.is_dir() else run_dir
    if not run_dir.is_dir():
        raise StorageError(f"expected the directory of a run or a model, found none at {run_dir}: check the path")
    if directory == run_dir and "hash" in _json(run_dir, rundir.CONFIG):
        raise StorageError(f"expected an exported student at {student}, found none: run raydistil export first")
    config = _json(directory, "config.json")
    _json(directory, TOKENIZER)
    _check_weights(directory)
    report = _json(directory, REPORT) if (directory / REPORT).exists() else None
    task = _task(directory, config)
    mask_token = _mask_token(directory) if task == "mlm" else None
    return Source(run_dir.resolve().name, str(directory.resolve()), task, mask_token, report or None)


def _json(directory: Path, name: str) -> dict[str, Any]:
    """Raises StorageError where the file is missing or broken."""
    path = directory / name
    try:
        value: Any = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise _incomplete(directory, name, "is not there") from error
    except ValueError as error:
        raise _incomplete(directory, name, f"is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise _incomplete(directory, name, "is not a JSON object")
    return value


def _check_weights(directory: Path) -> None:
    """Raises StorageError where the file is missing or shorter than its header says."""
    path = directory / WEIGHTS
    if not path.is_file():
        raise _incomplete(directory, WEIGHTS, "is not there")
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise _incomplete(directory, WEIGHTS, f"is broken ({error})") from error


def _incomplete(directory: Path, name: str, what: str) -> StorageError:
    return StorageError(
        f"expected a whole model in {directory} (config.json, {WEIGHTS}, {TOKENIZER}), but {name} {what}: "
        f"run raydistil export again, or check the path"
    )


def _task(directory: Path, config: dict[str, Any]) -> Task:
    """By the model's head. Raises StorageError for one that no route answers for."""
    names = config.get("architectures") or []
    if any(name.endswith(CAUSAL) for name in names):
        raise StorageError(
            f"expected a model {' or '.join(HEADS)} in {directory}, got the causal language model {names[0]}: there is "
            f"no route for those, load it with transformers' AutoModelForCausalLM"
        )
    if "pooling" in config or (directory / SENTENCE_LAYOUT).exists():
        return "embedding"
    tasks = [task for name in names for head, task in HEADS.items() if name.endswith(head)]
    if not tasks:
        raise StorageError(
            f"expected a model {' or '.join(HEADS)} in {directory}, its architecture is "
            f"{', '.join(names) or 'not given'}: serve the exported student of a run"
        )
    _check_scores(directory, config, tasks[0])
    return tasks[0]


def _check_scores(directory: Path, config: dict[str, Any], task: Task) -> None:
    """Raises StorageError where a head's numbers are no scores of labels, one of which is chosen."""
    one = task == "classification" and len(config.get("id2label") or "??") == 1
    if config.get("problem_type") == "regression" or one:
        raise StorageError(
            f"expected a model that chooses one label in {directory}, got one that gives a number: there is no route "
            f"for those, load it with transformers' AutoModelForSequenceClassification"
        )
    if config.get("problem_type") not in (None, "single_label_classification"):
        raise StorageError(
            f"expected a model that chooses one label in {directory}, its problem_type is {config['problem_type']}: "
            f"its scores would mean something else"
        )


def _mask_token(directory: Path) -> str | None:
    """As the tokenizer's settings have it; some leave it to the tokenizer's class."""
    settings = _json(directory, SETTINGS) if (directory / SETTINGS).exists() else {}
    token = settings.get("mask_token")
    return token["content"] if isinstance(token, dict) else token


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
        import torch
        from ray import serve

        from raydistil.serve.model import load

        torch.set_num_threads(1)  # a replica is one CPU to Ray
        self._name = serve.get_replica_context().replica_id.unique_id
        self._model, self._stats, self._board = load(source, replica=self._name), Stats(), board()

    def __serve_build_asgi_app__(self) -> "FastAPI":
        from raydistil.serve.app import build_api

        return build_api(self._model, self._gather)

    async def _gather(self, families: Families) -> list[Families]:
        made: list[Families] = await self._board.show.remote(self._name, families)
        return made

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
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # its import sets the level to INFO
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    except RuntimeError as error:
        raise RaydistilError(f"expected a port to listen on: {_cause(str(error))} Choose one with --port") from error
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
            serve.shutdown()
            with suppress(ValueError):  # no replica had come up
                ray.kill(ray.get_actor(BOARD, namespace=APP))


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


def _wait() -> None:
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
