"""TextBrewer beside the default recipe: the same texts, teachers, starts of the student and number of steps.

Run after `raydistil bench fidelity`, whose output directory holds the teachers and the students' starts:

    pip install -e '.[compare]'
    python tests/compare_textbrewer.py --data DIR --output runs/fidelity --json

TextBrewer gets what its documentation gives for a student of three layers: soft labels at temperature 8 and MSE of
hidden states of every layer; the learning rate is the one of `--lr` that is best on the validation split of seed 0.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
from transformers import get_linear_schedule_with_warmup

from raydistil import rundir
from raydistil.bench.fidelity import DEFAULTS, SPLITS, Row, config_for
from raydistil.config import Config, EvaluateConfig
from raydistil.evaluate import evaluate
from raydistil.manifest import Manifest
from raydistil.models import load_model, made_for_training, quiet_transformers
from raydistil.optim import parameter_groups
from raydistil.plan import cores
from raydistil.prepare import Prepared, prepare
from raydistil.source import MicroBatches
from raydistil.specs import Candidate, EvaluateSpec, SourceSpec
from raydistil.student import save_model

Batch = dict[str, torch.Tensor]


class Batches:
    """What a data loader is to TextBrewer: the micro-batches of one epoch, in the order of the manifest."""

    def __init__(self, run: Prepared) -> None:
        assert run.config.distill is not None
        config = run.config.distill
        rows = run.store.bucket_rows("train", labelled=True)
        self.manifest = Manifest(rows, config.epochs, config.micro_batch_size, run.config.seed)
        self._made = MicroBatches(SourceSpec(run.store.path, "train", self.manifest, None))
        self._epoch = 0

    def __len__(self) -> int:
        return self.manifest.per_epoch

    def __iter__(self) -> Iterator[Batch]:
        first = self._epoch * len(self)
        self._epoch += 1
        for index in range(first, first + len(self)):
            batch = self._made.make(index)
            ids_BL = torch.from_numpy(batch.input_ids_BL.astype("int64"))
            mask_BL = torch.arange(ids_BL.shape[1])[None] < torch.from_numpy(batch.lengths_B)[:, None]
            labels_B = torch.from_numpy(np.asarray(batch.labels_B, np.int64))
            yield {"input_ids": ids_BL, "attention_mask": mask_BL.long(), "labels": labels_B}


def adapted(batch: Batch, outputs: Any) -> dict[str, Any]:
    return {"logits": outputs.logits, "hidden": outputs.hidden_states, "inputs_mask": batch["attention_mask"]}


def train(run: Prepared, teacher_dir: str, init: str, row: Row, lr: float, target: Path) -> None:
    """One student by TextBrewer's GeneralDistiller, in one process, float32 weights and bfloat16 products."""
    assert run.config.distill is not None
    torch.manual_seed(run.config.seed)
    cpu = torch.device("cpu")
    teacher = load_model(teacher_dir, "classification").eval()
    student = made_for_training(load_model(init, "classification"), 0.0, cpu).train()
    for model in (teacher, student):
        model.config.output_hidden_states = True
    batches = Batches(run)
    steps = batches.manifest.num_micro_batches
    optimizer = torch.optim.AdamW(parameter_groups(student, 0.01), lr=lr, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
    per_layer = teacher.config.num_hidden_layers // row.num_layers
    matches = [
        {"layer_T": per_layer * n, "layer_S": n, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
        for n in range(row.num_layers + 1)
    ]
    distiller = GeneralDistiller(
        TrainingConfig(device="cpu", output_dir=str(target), ckpt_frequency=0, ckpt_epoch_frequency=10**6),
        DistillationConfig(temperature=8, hard_label_weight=0, kd_loss_type="ce", intermediate_matches=matches),
        teacher, student, adapted, adapted,
    )  # fmt: skip
    # cache_enabled: within one context the cast weights would be kept, and the student never see its own steps
    with distiller, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        distiller.train(
            optimizer,
            batches,
            num_epochs=run.config.distill.epochs,
            scheduler=schedule,
            max_grad_norm=1.0,
            callback=None,
        )
    save_model(student, teacher_dir, target)


def scores(run: Prepared, teacher_dir: str, student: Path) -> dict[str, dict[str, float]]:
    found = {}
    for split in SPLITS:
        spec = EvaluateSpec(
            "classification", run.store.path, split, None, run.labels, "bfloat16", EvaluateConfig(), cores()
        )
        named = (("teacher", teacher_dir), ("student", str(student)))
        both = [Candidate(name, (path,), (1.0,), False) for name, path in named]
        found[split] = {report.name: report.score.value for report in evaluate(spec, both)}
    return found


def one(config: Config, output: Path, row: Row, lr: float) -> dict[str, dict[str, float]]:
    """{split: {teacher, student}} of one seed and learning rate, made unless it is there."""
    run = prepare(config, lambda line: None)
    target = output / f"textbrewer-{row.num_layers}-{config.seed}-{lr:g}"
    kept = target / "scores.json"
    if not kept.exists():
        teacher_dir = str(output / f"teacher-{config.seed}")
        train(run, teacher_dir, str(run.run_dir / rundir.STUDENT_INIT), row, lr, target)
        kept.write_text(json.dumps(scores(run, teacher_dir, target)))
    found: dict[str, dict[str, float]] = json.loads(kept.read_text())
    return found


def compared(data: Path, output: Path, row: Row, seeds: int, rates: list[float]) -> dict[str, Any]:
    """One line of the result: the best rate of the first seed, then all seeds with it."""

    def found(seed: int, lr: float) -> dict[str, dict[str, float]]:
        return one(config_for(data, output, row, seed), output, row, lr)

    best = max(rates, key=lambda lr: found(0, lr)["validation"]["student"])
    tests = [found(seed, best)["test"] for seed in range(seeds)]
    retained = [test["student"] / test["teacher"] for test in tests]
    return {"layers": row.num_layers, "lr": best, "test_retention": statistics.mean(retained), "each": retained}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/fidelity"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, action="append")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    quiet_transformers()
    rates = chosen.lr or [1e-4, 3e-4]
    rows = [compared(chosen.data, chosen.output, row, chosen.seeds, rates) for row in DEFAULTS]
    text = json.dumps({"system": "textbrewer", "rows": rows}) if chosen.json else "\n".join(map(str, rows))
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
