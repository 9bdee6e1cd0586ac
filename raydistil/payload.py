"""How much of the data itself passes through a process that should meet references and counters alone.

Ray has no such counter. Whatever a process fetches, its own objects too, is unpacked in one place, and that is watched.
Not seen: blocks under Ray's limit for small objects (100 kB), which stay inside its replies to their owner, the process
that schedules; nobody there unpacks them.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray._private.worker import global_worker
from ray.data import DataContext, Dataset
from ray.data._internal.execution.execution_callback import ExecutionCallback

KEY = "raydistil_payload"  # of the data context: the file in which an execution leaves its counts
CONTROL = pa.table({"control": np.zeros(1 << 16)})


class Payload:
    """Bytes of data this process has fetched since `watch`: Arrow tables and columns, arrays."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._unpack: Any = None

    def watch(self) -> None:
        self._unpack = global_worker.deserialize_objects
        global_worker.deserialize_objects = self._counted  # type: ignore[method-assign]

    def end(self) -> None:
        global_worker.deserialize_objects = self._unpack  # type: ignore[method-assign]

    def control(self) -> int:
        """What the counter says of one block that is sent through this process on purpose; counted in no sum."""
        before = self.num_bytes
        ray.get(ray.put(CONTROL))
        seen, self.num_bytes = self.num_bytes - before, before
        return seen

    def _counted(self, *args: Any, **kwargs: Any) -> Any:
        values = self._unpack(*args, **kwargs)
        self.num_bytes += sum(map(_size, values))
        return values


def _size(value: Any) -> int:
    """Of data: Ray Data's blocks are Arrow tables; what it says of them travels as pickles."""
    if isinstance(value, pa.Table | pa.RecordBatch | pa.Array | pa.ChunkedArray | np.ndarray):
        return int(value.nbytes)
    return 0


class Counted(ExecutionCallback):
    """Watches the process that schedules an execution, and leaves what it saw in the file the data context names."""

    def __init__(self) -> None:
        self._payload = Payload()
        self._control = 0
        self._began_s = 0.0

    def before_execution_starts(self, executor: Any) -> None:
        self._payload.watch()
        self._control = self._payload.control()
        self._began_s = time.process_time()

    def after_execution_succeeds(self, executor: Any) -> None:
        self._payload.end()
        spent_s = time.process_time() - self._began_s
        _write(Path(DataContext.get_current().get_config(KEY)), self._payload, self._control, spent_s)

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        self._payload.end()


def count_payload(dataset: Dataset, run_dir: Path, stage: str) -> None:
    """Have the executions of `dataset` counted, wherever they are scheduled."""
    dataset.context.set_config(KEY, str(payload_path(run_dir, stage, "scheduler")))
    dataset.context.custom_execution_callback_classes.append(Counted)


@contextmanager
def counted(run_dir: Path, stage: str) -> Iterator[None]:
    """Count in this process, the driver."""
    payload = Payload()
    payload.watch()
    control, began_s = payload.control(), time.process_time()
    try:
        yield
    finally:
        payload.end()
    _write(payload_path(run_dir, stage, "driver"), payload, control, time.process_time() - began_s)


def payload_path(run_dir: Path, stage: str, process: str) -> Path:
    return run_dir / f"{stage}-payload-{process}.json"


def _write(path: Path, payload: Payload, control: int, cpu_s: float) -> None:
    path.write_text(json.dumps({"num_bytes": payload.num_bytes, "control": control, "cpu_s": cpu_s}))
