"""A small student of each task, and its app behind a server of its own."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny
import uvicorn

from raydistil.serve.ports import free_port
from raydistil.types import Task


@contextmanager
def running(app: Any) -> Iterator[str]:
    port = free_port("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def student(folder: Path, task: Task) -> Path:
    path = tiny.write_model(folder / "topics", task)
    if task == "embedding":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"pooling": "mean"}))
    return path
