"""How many workers there are, and how the student's state lies on them, changes nothing of what it learns."""

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from disks import small_disk
from test_pipeline import LANGUAGE_MODEL, TRAIN, config_for, quiet, stop_at_step
from torch import Tensor, nn

from raydistil import pipeline, rundir
from raydistil.checkpoint import TAG
from raydistil.config import Config
from raydistil.errors import FullError, Interrupted
from raydistil.models import load_model
from raydistil.resume import _put_together, _set_apart

# Otherwise weights as small as these are left whole.
PIECES = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
WORDS = "bert.embeddings.word_embeddings.weight"


def trained_by(folder: Path, teacher: str, corpus: Path, name: str, students: int, **train: Any) -> Config:
    """Steps of two micro-batches, whoever makes them; tied embeddings, whose head the losses use by themselves."""
    shape: dict[str, Any] = {**LANGUAGE_MODEL, "evaluate": None, "cluster": {"students": students}}
    distill = {**TRAIN, "epochs": 8, "dropout": 0.0, "accumulation": 2 // students, **train}
    return config_for(folder, teacher, corpus, name=name, distill=distill, **shape)


def weights(config: Config, name: str = rundir.DISTILLED) -> dict[str, Tensor]:
    return load_model(str(config.run_dir / name), "mlm").state_dict()


@pytest.fixture(scope="module")
def alone(
    ray_cluster: None, tiny_teacher: str, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """What one worker makes of it without a stop."""
    config = trained_by(tmp_path_factory.mktemp("alone"), tiny_teacher, corpus_file, "alone", 1)
    pipeline.run_all(config, quiet)
    after = weights(config)
    assert (after[WORDS] - weights(config, "student_init")[WORDS]).abs().max() > 1e-2
    return after


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "workers"), [(0, (1, 2)), (2, (2, 1, 2)), (3, (2, 1, 2))])
def test_workers_come_and_go(
    alone: dict[str, Tensor], tiny_teacher: str, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    stage: int, workers: tuple[int, ...],
) -> None:  # fmt: skip
    """Stopped on the way, and taken up by another number of them, where there is one."""
    first, *others = workers
    config = trained_by(tmp_path, tiny_teacher, corpus_file, "run", first, zero_stage=stage, deepspeed=PIECES)
    for number, count in enumerate(others):
        stop_at_step(monkeypatch, 3 + 8 * number)
        with pytest.raises(Interrupted, match="stopped after step"):
            pipeline.run_all(config, quiet)
        monkeypatch.undo()
        if (stage, number) == (2, 0):
            with suppress(pytest.skip.Exception):  # where nothing can be mounted
                cannot_be_put_together_on_a_full_disk(config, tmp_path / "disk")
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"students": count})})
    pipeline.run_all(config, quiet)
    for name, weight in weights(config).items():
        torch.testing.assert_close(weight, alone[name], rtol=1e-2, atol=1e-3)


def cannot_be_put_together_on_a_full_disk(config: Config, disk: Path) -> None:
    store = rundir.checkpoints_of(config, rundir.DISTILL)
    kept = store.newest()
    assert kept is not None and store.local is not None
    with small_disk(disk, 1 << 20), pytest.raises(FullError, match=f"no space left in {disk} .* directory with TMPDIR"):
        _put_together(store.local / kept.name / TAG, disk / TAG)


def test_what_one_group_of_weights_counts_is_not_counted_by_the_others() -> None:
    """After loading by a DeepSpeed that gave both the first one's decay and one tensor of steps."""
    groups = [{"params": [nn.Parameter(torch.ones(2))], "weight_decay": decay} for decay in (0.5, 0.0)]
    adam = torch.optim.AdamW(groups, lr=0.1)
    given = torch.tensor(7.0)
    for group in adam.param_groups:
        group["weight_decay"] = 0.5
        moments = {"exp_avg": torch.zeros(2), "exp_avg_sq": torch.ones(2)}
        adam.state[group["params"][0]] = {"step": given, **moments}
    _set_apart(SimpleNamespace(optimizer=adam, param_groups=adam.param_groups), [0.5, 0.0])
    for group in adam.param_groups:
        group["params"][0].grad = torch.zeros(2)
    adam.step()
    (decayed,), (kept,) = (group["params"] for group in adam.param_groups)
    assert torch.equal(decayed, torch.full((2,), 0.95)) and torch.equal(kept, torch.ones(2))
    assert [adam.state[part]["step"].item() for part in (decayed, kept)] == [8, 8]
