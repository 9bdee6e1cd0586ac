"""Checkpoints: DeepSpeed shards of all workers, plain Hugging Face weights and the ledger, committed by Ray Train.

A micro-batch is consumed when the optimizer step that used it is in the checkpoint; the stream of a resumed run is the
manifest less the ledger.
"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint

from raydistil.errors import StorageError
from raydistil.manifest import Ledger
from raydistil.types import TrainSummary

TAG = "deepspeed"
MODEL = "model"
STATE = "state.json"


def save_state(engine: Any, ledger: Ledger, tokenizer: str, summary: TrainSummary) -> None:
    """Save and report; every worker must call this at the same step."""
    path = Path(tempfile.mkdtemp(prefix="raydistil-"))
    engine.save_checkpoint(str(path), tag=TAG)
    context = ray.train.get_context()
    from raydistil.partitioned import gathered  # the controller, which reads ledgers only, is spared torch
    from raydistil.student import save_model

    with gathered(engine.module.model):
        if context.get_world_rank() == 0:
            save_model(engine.module.model, tokenizer, path / MODEL)
    if context.get_world_rank() == 0:
        (path / STATE).write_text(json.dumps({"ledger": ledger.ranges, "workers": context.get_world_size()}))
    ray.train.report(
        asdict(summary),
        checkpoint=Checkpoint.from_directory(path),
        checkpoint_dir_name=f"step-{engine.global_steps:09d}",
        delete_local_checkpoint_after_upload=True,
    )


def load_state(checkpoint: Checkpoint, engine: Any) -> Ledger:
    """Put weights, optimizer and schedule back into `engine`; returns what was consumed by then.

    Raises StorageError where the checkpoint was written by another number of workers.
    """
    with checkpoint.as_directory() as folder:
        before, now = _state(Path(folder))["workers"], ray.train.get_context().get_world_size()
        if before != now:
            raise StorageError(
                f"expected the {before} student workers the checkpoint was written by, got {now}: "
                f"set cluster.students={before} to go on, or start anew with --set name=..."
            )
        engine.load_checkpoint(folder, tag=TAG)
        return _ledger(Path(folder))


def _state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def _ledger(folder: Path) -> Ledger:
    return Ledger(tuple((start, end) for start, end in _state(folder)["ledger"]))


def latest_ledger(storage: Path) -> Ledger:
    """What the checkpoint that Ray Train will resume from has consumed; nothing where there is none."""
    snapshot = storage / "checkpoint_manager_snapshot.json"
    if not snapshot.exists():
        return Ledger()
    latest = json.loads(snapshot.read_text()).get("latest_checkpoint_result")
    return Ledger() if latest is None else _ledger(storage / latest["checkpoint_dir_name"])
