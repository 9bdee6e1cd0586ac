"""A backend in a process of its own: the server's event loop has Python's lock to itself, and the model the other's.

In one process a model asks for that lock between any two of its operations, and waits while the loop has it: the more
such a server is asked, the less it answers.
"""

import gc
import os
import pickle
import socket
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from raydistil.errors import ModelError
from raydistil.serve.backends import Best, Result, Row
from raydistil.serve.choice import Chosen, choose
from raydistil.serve.schema import Wish
from raydistil.serve.served import Hardware
from raydistil.types import Task

END_S = 5.0


class Apart:
    """As the batcher calls it: from one thread, a batch at a time."""

    def __init__(self, directory: str, task: Task, labels: tuple[str, ...], hardware: Hardware, wish: Wish) -> None:
        """Raises ModelError as `choose` does."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "raydistil.serve.apart", str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        self._line = Connection(ours.detach())
        self._line.send((directory, task, labels, hardware, wish))
        self.name: str
        self.name, self.rows_s, self.left_out = self._answer()

    def run(self, rows: list[Row]) -> list[Result | Best]:
        """Raises what the model raises, and ModelError where its process is no more."""
        try:
            self._line.send(rows)
        except OSError as error:
            raise self._dead() from error
        made: list[Result | Best] = self._answer()
        return made

    def wait(self) -> None:
        """Until the process has ended."""
        self._process.wait()

    def close(self) -> None:
        """The process ends when nobody speaks to it."""
        self._line.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _answer(self) -> Any:
        try:
            said, error = self._line.recv()
        except (EOFError, OSError) as gone:
            raise self._dead() from gone
        if error is not None:
            raise error
        return said

    def _dead(self) -> ModelError:
        return ModelError(f"expected the model's process to answer, it ended with {self._process.poll()}")


def choose_apart(directory: str, task: Task, labels: tuple[str, ...], hardware: Hardware, wish: Wish) -> Chosen:
    """`choice.choose`, in a process of its own that stays."""
    backend = Apart(directory, task, labels, hardware, wish)
    return Chosen(backend, backend.rows_s, backend.left_out)


def settled() -> None:
    """What is there now stays: else the collector would stop everything for a third of a second to look at it."""
    gc.collect()
    gc.freeze()


# ---- in the process


def _serve(line: Connection) -> None:
    """Until nobody speaks to it any more, or there is no backend."""
    try:
        chosen = _chosen(line, line.recv())
        settled()
        while chosen is not None:
            line.send(_outcome(chosen, line.recv()))
    except (EOFError, OSError):
        return


def _chosen(line: Connection, asked: tuple[str, Task, tuple[str, ...], Hardware, Wish]) -> Chosen | None:
    try:
        chosen = choose(*asked)
    except Exception as error:
        line.send((None, _portable(error)))
        return None
    line.send(((chosen.backend.name, chosen.rows_s, chosen.left_out), None))
    return chosen


def _outcome(chosen: Chosen, rows: list[Row]) -> tuple[list[Result | Best] | None, Exception | None]:
    try:
        return chosen.backend.run(rows), None
    except Exception as error:
        traceback.print_exc()  # into Ray's log of the replica: it is lost on the way
        return None, _portable(error)


def _portable(error: Exception) -> Exception:
    """The error, if it can be sent; else what it says. Its frames hold what did not fit into memory."""
    error.__traceback__, error.__cause__, error.__context__ = None, None, None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return ModelError(f"{type(error).__name__}: {error}")
    return error


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)
