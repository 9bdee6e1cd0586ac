"""What Ray says of processes that died: into a file, where Ray would print it between a run's own lines, on stdout."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOG = "ray.txt"  # in a run's directory


@contextmanager
def kept_in(log: Path) -> Iterator[None]:
    """Within the block, of this process's own cluster; the file is there when something was said."""
    from ray._private import worker

    said = worker.print_worker_logs

    def keep(data: dict[str, Any], print_file: Any, ignore_prefix: bool = False) -> None:
        if data.get("pid") != "raylet":  # a user's own worker, of a cluster that was there before
            said(data, print_file, ignore_prefix)
            return
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf8") as file:
            file.writelines(f"{line}\n" for line in data["lines"])

    worker.print_worker_logs = keep
    try:
        yield
    finally:
        worker.print_worker_logs = said
