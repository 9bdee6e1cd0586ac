"""Training goes on from a checkpoint, on as many workers as there are now."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
from torch import Tensor

from raydistil.checkpoint import TAG, CheckpointStore, State
from raydistil.errors import FullError, StorageError
from raydistil.storage import is_disk_full, scratch_directory

# DeepSpeed's own name for weights and moments that have been put together again out of all workers' pieces.
UNIVERSAL = {"checkpoint": {"load_universal": True}}


@dataclass(frozen=True, slots=True)
class Resumed:
    """A checkpoint to go on from. `universal`: for an engine that was made with UNIVERSAL in its configuration."""

    state: State
    universal: bool
    folder: Path

    def load(self, engine: Any) -> None:
        """Put weights, optimizer and schedule back into `engine`."""
        decays = [group.get("weight_decay") for group in engine.optimizer.param_groups]
        engine.load_checkpoint(str(self.folder), tag=TAG)
        assert engine.global_steps == self.state.steps
        if self.universal:
            _set_apart(engine.optimizer, decays)


@contextmanager
def resumed(store: CheckpointStore, name: str | None, zero_stage: int) -> Iterator[Resumed | None]:
    """What to go on from, its files there until the block ends; None (as `name`) at the start of a training.

    Raises StorageError where pieces of another number of workers cannot be put together.
    """
    if name is None:
        yield None
        return
    with store.at_hand(name) as folder, scratch_directory() as scratch:
        state, workers = store.state(name), ray.train.get_context().get_world_size()
        universal = zero_stage > 0 and state.workers != workers
        if universal:
            _put_together(folder / TAG, scratch / TAG)
        yield Resumed(state, universal, scratch if universal else folder)


def _set_apart(optimizer: Any, decays: list[float | None]) -> None:
    """What DeepSpeed's loading of stage 3 gives to all groups of weights together: one group's decay, and one tensor
    that counts the steps, which each group then counts up."""
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in optimizer.optimizer.state.values():
        if isinstance(state["step"], Tensor):
            state["step"] = state["step"].to(state["exp_avg"].device, copy=True)  # where a fused optimizer wants it


def _put_together(pieces: Path, target: Path) -> None:
    """By DeepSpeed's own converter, which is a program."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", str(pieces), "--output_folder", str(target)]
    done = subprocess.run([*command, *folders], capture_output=True, text=True)
    if is_disk_full(OSError(done.stderr)):
        raise FullError(
            f"no space left in {target.parent} to put the pieces of {pieces} together: free some, or name another "
            f"directory with TMPDIR, and run again"
        )
    if done.returncode:
        *_, last = done.stderr.strip().splitlines() or ["it says nothing"]
        raise StorageError(
            f"expected a checkpoint that another number of workers can go on from, cannot convert {pieces}: "
            f"{last}; use as many cluster.students as before"
        )
