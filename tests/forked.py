"""Ray's worker processes as forks of one that has imported all they need: a training starts in seconds of two cores.

What a training spends of its start goes into imports, five to ten processes of it. `forking()` has the cluster that is
started in it run this file in place of Ray's `setup_worker.py`; it asks the one process for a fork with the same
arguments, environment and files, and ends when that does. Nothing of the package knows of it.
"""

import argparse
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOCKET = "RAYDISTIL_TEST_FORKS"
MODULES = (
    "deepspeed", "ray.data", "ray.train", "ray.train.v2._internal.execution.controller", "raydistil.source",
    "raydistil.stages", "raydistil.teacher", "raydistil.worker", "transformers.models.bert.modeling_bert",
)  # fmt: skip
FILES = (0, 1, 2)
READ_ONCE = ("RAY_JOB_ID", "RAY_RAYLET_PID")  # of the environment, as Ray is imported


@contextmanager
def fork_server() -> Iterator[str]:
    """The one process; it ends with the block. Yields where it listens."""
    listening, ready = os.pipe()
    folder = tempfile.mkdtemp()
    path = f"{folder}/socket"
    command = [sys.executable, __file__, "--serve", path, str(ready)]
    server = subprocess.Popen(command, pass_fds=[ready], stdin=subprocess.PIPE)
    os.close(ready)
    os.read(listening, 1)
    os.close(listening)
    try:
        yield path
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(folder)


@contextmanager
def forking(path: str) -> Iterator[None]:
    """The raylet that is started within the block has its workers forked. Others do not: a fork would outlive them."""
    from ray._private import ray_constants

    before, ray_constants.SETUP_WORKER_FILENAME = ray_constants.SETUP_WORKER_FILENAME, __file__
    os.environ[SOCKET] = path
    try:
        yield
    finally:
        del os.environ[SOCKET]
        ray_constants.SETUP_WORKER_FILENAME = before


# ---- in place of setup_worker.py


def ask(path: str) -> None:
    """Have the worker forked, and live as long as it."""
    asked = json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": str(Path.cwd())}).encode()
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        socket.send_fds(line, [len(asked).to_bytes(8, "big")], FILES)
        line.sendall(asked)
        with suppress(ConnectionError):
            line.recv(1)  # nothing ever comes but the end


# ---- the one process


@dataclass(frozen=True, slots=True)
class Request:
    """What the process was started with that is to be a worker."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    files: list[int]


def serve(path: str, ready: int) -> None:
    """Until it is told to end, or who started it has."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path)
        door.listen(64)
        os.close(ready)
        while sys.stdin not in select.select([door, sys.stdin], [], [])[0]:  # of which there only is an end
            line, _ = door.accept()
            with line:
                _fork(_request(line), door)


def _request(line: socket.socket) -> Request:
    head, files, _, _ = socket.recv_fds(line, 8, len(FILES))
    with line.makefile("rb") as stream:
        return Request(**json.loads(stream.read(int.from_bytes(head, "big"))), files=files)


def _fork(request: Request, door: socket.socket) -> None:
    """The child keeps its end of the line open for as long as it is there."""
    if "ray" not in sys.modules:
        _import_all(request.environment)
    if os.fork() == 0:
        door.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _become(request)
        os._exit(0)
    for number in request.files:
        os.close(number)


def _import_all(environment: dict[str, str]) -> None:
    """Ray draws no name of its own meanwhile: all forks would go on with the same ones, and tasks of two of them meet
    in a third process under one name, which dies of it."""
    os.environ.update({name: environment[name] for name in READ_ONCE})
    import ray.actor

    kind: Any = ray.actor.ActorClassID
    ray.actor.ActorClassID = SimpleNamespace(from_random=lambda: kind(os.urandom(kind.size())))
    for module in MODULES:
        importlib.import_module(module)
    ray.actor.ActorClassID = kind


def _become(request: Request) -> None:
    """The worker that is asked for."""
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs

    for number, given in zip(FILES, request.files, strict=True):
        os.dup2(given, number)
        os.close(given)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    parser = argparse.ArgumentParser()  # as setup_worker.py has it
    parser.add_argument("--serialized-runtime-env-context", default="{}")
    parser.add_argument("--language")
    own, (script, *rest) = parser.parse_known_args(request.arguments)
    update_envs(RuntimeEnvContext.deserialize(own.serialized_runtime_env_context).env_vars)
    sys.argv = [script, *rest]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        ask(os.environ[SOCKET])
