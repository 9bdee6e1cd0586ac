"""TextBrewer beside the default recipe: the same texts, teachers and number of steps.

Run after `raydistil bench fidelity`, whose output directory holds the teachers and the students' starts:

    pip install -e '.[compare]'
    python tests/compare_textbrewer.py --data DIR --output runs/fidelity --json

TextBrewer gets what its documentation gives for a student of three layers: soft labels at temperature 8 and MSE of
hidden states of every layer; the learning rate is the one of `--lr` that is best on the validation split of seed 0.
Its student starts, as that of any of its users, from every other (of 2 layers: every third) layer of the teacher, and
has the steps of both stages of the recipe; and once more from what the first of them, the general distillation, has
made, with those of the second.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from raydistil import rundir
from raydistil.bench.fidelity import DEFAULTS, Row, config_for
from raydistil.config import EvaluateConfig
from raydistil.config.student import StudentConfig
from raydistil.evaluate import class_outcomes
from raydistil.manifest import Manifest
from raydistil.models import HeadedEncoder, load_model, quiet_transformers
from raydistil.optim import parameter_groups
from raydistil.plan import cores
from raydistil.prepare import Prepared, prepare
from raydistil.scores import Z95
from raydistil.source import MicroBatches
from raydistil.specs import EvaluateSpec, SourceSpec
from raydistil.storage import whole_directory
from raydistil.student import build_student, save_model
from raydistil.student.training import made_for_training
from raydistil.types import Split

Batch = dict[str, torch.Tensor]
Hits = NDArray[np.bool_]
Start = Literal["layers", "general"]  # of the teacher, or what its general distillation made
STARTS: tuple[Start, ...] = ("layers", "general")


class Batches:
    """What a data loader is to TextBrewer: the micro-batches of one epoch, in the order of the manifest."""

    def __init__(self, run: Prepared, epochs: int) -> None:
        assert run.config.distill is not None
        rows = run.store.bucket_rows("train", labelled=True)
        self.manifest = Manifest(rows, epochs, run.config.distill.micro_batch_size, run.config.seed)
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


@dataclass(frozen=True, slots=True)
class Arm:
    """Of one depth: where TextBrewer's student comes from, and how long it learns."""

    name: Start
    row: Row

    def start(self, run: Prepared, teacher: PreTrainedModel) -> PreTrainedModel:
        if self.name == "general":
            return load_model(str(run.run_dir / rundir.STUDENT_INIT), "classification")
        chosen = tuple(range(0, teacher.config.num_hidden_layers, self.every(teacher)))
        return build_student(teacher, StudentConfig(layers=chosen), "classification")

    def epochs(self, run: Prepared) -> int:
        assert run.config.distill is not None
        general = run.config.distill.general
        return run.config.distill.epochs + (general.epochs if general and self.name == "layers" else 0)

    def every(self, teacher: PreTrainedModel) -> int:
        return int(teacher.config.num_hidden_layers) // self.row.num_layers


def train(run: Prepared, teacher_dir: str, arm: Arm, lr: float, target: Path) -> None:
    """One student by TextBrewer's GeneralDistiller, in one process, float32 weights and bfloat16 products."""
    torch.manual_seed(run.config.seed)
    cpu = torch.device("cpu")
    teacher = load_model(teacher_dir, "classification").eval()
    student = made_for_training(arm.start(run, teacher), 0.0, cpu).train()
    for model in (teacher, student):
        model.config.output_hidden_states = True
    batches = Batches(run, arm.epochs(run))
    steps = batches.manifest.num_micro_batches
    optimizer = torch.optim.AdamW(parameter_groups(student, 0.01), lr=lr, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
    matches = [
        {"layer_T": arm.every(teacher) * n, "layer_S": n, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
        for n in range(arm.row.num_layers + 1)
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
            num_epochs=arm.epochs(run),
            scheduler=schedule,
            max_grad_norm=1.0,
            callback=None,
        )
    save_model(student, teacher_dir, target)


def right(run: Prepared, model: str, split: Split) -> Hits:
    """Which of the split's texts it puts into their class, in the order of the store."""
    how = EvaluateConfig()
    spec = EvaluateSpec("classification", run.store.path, split, None, run.labels, "bfloat16", how, cores())
    head = HeadedEncoder(load_model(model, "classification", run.labels), "classification", "bfloat16").eval()
    truth, guesses = class_outcomes([(head, 1.0)], spec, torch.device("cpu"))
    return np.equal(truth, guesses)


def trained(run: Prepared, output: Path, arm: Arm, lr: float) -> str:
    """TextBrewer's student of one seed and learning rate, made unless it is there."""
    target = output / f"textbrewer-{arm.name}-{arm.row.num_layers}-{run.config.seed}-{lr:g}"
    if not target.exists():
        with whole_directory(target) as scratch:
            train(run, teacher_of(run, output), arm, lr, scratch)
    return str(target)


def teacher_of(run: Prepared, output: Path) -> str:
    return str(output / f"teacher-{run.config.seed}")


def compared(data: Path, output: Path, arm: Arm, seeds: int, rates: list[float]) -> dict[str, Any]:
    """One line of the result: the best rate of the first seed, then all seeds with it, on the texts of the test split.

    `ours_minus_textbrewer`: of the share of the texts that are right, in points, and its 95 % interval over the texts,
    each of which counts with its mean over the seeds.
    """
    runs = [prepare(config_for(data, output, arm.row, seed), lambda line: None) for seed in range(seeds)]
    best = max(rates, key=lambda lr: right(runs[0], trained(runs[0], output, arm, lr), "validation").mean())
    teachers = [right(run, teacher_of(run, output), "test") for run in runs]
    theirs = [right(run, trained(run, output, arm, best), "test") for run in runs]
    ours = [right(run, str(run.run_dir / rundir.DISTILLED), "test") for run in runs]
    gains = np.mean([100.0 * mine - 100.0 * other for mine, other in zip(ours, theirs, strict=True)], axis=0)
    mean, half = float(gains.mean()), Z95 * float(gains.std(ddof=1)) / math.sqrt(len(gains))
    return {
        "layers": arm.row.num_layers, "start": arm.name, "lr": best,
        "textbrewer": retained(theirs, teachers), "ours": retained(ours, teachers),
        "ours_minus_textbrewer": mean, "interval": [mean - half, mean + half],
    }  # fmt: skip


def retained(students: list[Hits], teachers: list[Hits]) -> dict[str, Any]:
    """What each seed's student keeps of its teacher's accuracy, and the mean."""
    each = [float(student.mean() / teacher.mean()) for student, teacher in zip(students, teachers, strict=True)]
    return {"test_retention": statistics.mean(each), "each": each}


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
    arms = [Arm(name, row) for name in STARTS for row in DEFAULTS]
    rows = [compared(chosen.data, chosen.output, arm, chosen.seeds, rates) for arm in arms]
    text = json.dumps({"system": "textbrewer", "rows": rows}) if chosen.json else "\n".join(map(str, rows))
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
