"""Checkpoints: DeepSpeed shards of all workers, plain Hugging Face weights and the ledger, committed by Ray Train.

A micro-batch is consumed when the optimizer step that used it is in the checkpoint; the stream of a resumed run is the
manifest less the ledger (see `resume`).
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint

from raydistil.manifest import Ledger
from raydistil.types import TrainSummary

TAG = "deepspeed"
MODEL = "model"
STATE = "state.json"


@dataclass(frozen=True, slots=True)
class State:
    """What a checkpoint says of itself."""

    ledger: Ledger
    per_step: int  # micro-batches of an optimizer step
    workers: int  # that it was written by

    @property
    def steps(self) -> int:
        """Optimizer steps that are done."""
        return self.ledger.done(self.per_step)


def save_state(engine: Any, ledger: Ledger, per_step: int, tokenizer: str, summary: TrainSummary) -> None:
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
        (path / STATE).write_text(json.dumps(asdict(State(ledger, per_step, context.get_world_size()))))
    ray.train.report(
        asdict(summary),
        checkpoint=Checkpoint.from_directory(path),
        checkpoint_dir_name=f"step-{engine.global_steps:09d}",
        delete_local_checkpoint_after_upload=True,
    )


def latest_state(storage: Path) -> State | None:
    """Of the checkpoint that Ray Train will resume from; None where there is none."""
    snapshot = storage / "checkpoint_manager_snapshot.json"
    if not snapshot.exists():
        return None
    latest = json.loads(snapshot.read_text()).get("latest_checkpoint_result")
    return None if latest is None else read_state(storage / latest["checkpoint_dir_name"])


def read_state(folder: Path) -> State:
    """Of the checkpoint in `folder`."""
    fields = json.loads((folder / STATE).read_text())
    ledger = Ledger(tuple((start, end) for start, end in fields.pop("ledger")["ranges"]))
    return State(ledger, **fields)
