"""Ray Data's scheduler at a pace that leaves the cores to the models."""

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

STEP_S = 0.02


class Paced(ExecutionCallback):
    """One step of the scheduler every `STEP_S` at most; see `DataContext.custom_execution_callback_classes`.

    While a stream is ahead of its student, finished work waits to be taken, so that the scheduler's wait for finished
    work returns at once: unpaced, it spins, and takes half a core from the teacher and the student.
    """

    def __init__(self) -> None:
        self._due = 0.0

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(max(0.0, self._due - time.monotonic()))
        self._due = time.monotonic() + STEP_S
