"""Checkpoints where they lie: complete or absent, whole or said not to be, on a disk and in an object store."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from disks import small_disk

from raydistil.checkpoint import MODEL, STATE, CheckpointStore, State
from raydistil.config.checkpoints import CheckpointsConfig
from raydistil.errors import FullError, StorageError
from raydistil.manifest import Ledger
from raydistil.saving import Saver
from raydistil.types import TrainSummary

SUMMARY = TrainSummary(1, 2, 3, 1.0, 0.5, 0.25, 0.0, 0.0, 1, 9, {"loss": 1.0}, False, None, 0.5, 0)


def state(steps: int, mean_loss: float = 1.0, run_hash: str = "run") -> State:
    return State(Ledger(((0, 2 * steps),)), 2, 1, mean_loss, run_hash, {"seed": 0}, replace(SUMMARY, steps=steps), {})


class Engine:
    """What `Saver` asks of a DeepSpeed engine: files of its own, of each worker."""

    def __init__(self, steps: int, rank: int = 0) -> None:
        self.global_steps, self._rank = steps, rank
        self.module = SimpleNamespace(model=torch.nn.Linear(2, 2))

    def save_checkpoint(self, folder: str, tag: str) -> None:
        Path(folder, tag).mkdir(parents=True)
        Path(folder, tag, f"rank-{self._rank}").write_bytes(os.urandom(1 << 20))
        Path(folder, "latest").write_text(tag)


@pytest.fixture(autouse=True)
def _plain_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(model: torch.nn.Module, tokenizer: str, path: Path) -> None:
        path.mkdir()
        torch.save(model.state_dict(), path / tokenizer)

    monkeypatch.setattr("raydistil.saving.save_model", save)


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    if request.param == "disk":
        return CheckpointStore(str(tmp_path), "run/distill")
    return CheckpointStore(request.getfixturevalue("bucket"), f"{tmp_path.name}/distill")


def saved(store: CheckpointStore, *steps: int, start: str = "a", **config: Any) -> None:
    saver = Saver(store, CheckpointsConfig(**config), 0, 1, start)
    for step in steps:
        saver.save(Engine(step), "tokens", state(step, mean_loss=abs(step - 2.1)))
    saver.wait()


def names(store: CheckpointStore) -> list[str]:
    return [kept.name for kept in store.complete()]


def test_what_is_saved_is_there_with_all_that_it_says(store: CheckpointStore) -> None:
    assert store.newest() is None
    saved(store, 3)
    kept = store.newest_whole("run", pytest.fail)
    assert kept is not None and kept.name == "step-000000003-a"
    assert kept.state == replace(state(3, mean_loss=abs(3 - 2.1)), files=kept.state.files)
    assert sorted(kept.state.files) == ["deepspeed/rank-0", "latest", f"{MODEL}/tokens"]
    with store.at_hand(f"{kept.name}/{MODEL}") as folder:
        assert [path.name for path in folder.iterdir()] == ["tokens"]
        assert set(torch.load(folder / "tokens")) == {"weight", "bias"}


def test_a_state_that_cannot_be_read_is_named_and_left_out(store: CheckpointStore) -> None:
    saved(store, 1, 2, 3)
    store.write(f"step-000000003-a/{STATE}", b"{")
    said: list[str] = []
    kept = store.newest_whole("run", said.append)
    assert kept is not None and kept.name == "step-000000002-a"
    assert len(said) == 1 and f"step-000000003-a is damaged ({STATE} cannot be read)" in said[0]
    store.sweep()
    assert store.read(f"step-000000003-a/{STATE}") == b"{"  # what may be of use to somebody is not swept away
    assert names(store) == ["step-000000002-a"]


def test_a_place_that_does_not_answer_loses_nothing(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: CheckpointStore, relative: str) -> bytes | None:
        raise OSError("slow down")

    saved(store, 1, 2)
    with monkeypatch.context() as context:
        context.setattr(CheckpointStore, "read", fail)
        store.sweep()
        with pytest.raises(OSError, match="slow down"):
            store.newest_whole("run", pytest.fail)
    assert names(store) == ["step-000000001-a", "step-000000002-a"]


def test_old_ones_that_cannot_be_removed_cost_nothing(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: CheckpointStore, last: int, best: int) -> None:
        raise OSError("busy")

    monkeypatch.setattr(CheckpointStore, "keep", refuse)
    saved(store, 1, 2, 3)
    assert names(store) == [f"step-00000000{step}-a" for step in (1, 2, 3)]


def test_the_newest_stay_and_the_best(store: CheckpointStore) -> None:
    saved(store, 1, 2, 3, 4, 5, keep_last=2, keep_best=1)
    assert names(store) == ["step-000000002-a", "step-000000004-a", "step-000000005-a"]


def test_a_damaged_one_takes_no_whole_ones_place(store: CheckpointStore) -> None:
    saved(store, 1, 2, 9)
    store.write("step-000000009-a/deepspeed/rank-0", b"half of it")
    said: list[str] = []
    kept = store.newest_whole("run", said.append, below=MODEL)
    assert kept is not None and kept.state.steps == 9, "what is not looked at is not found out"
    kept = store.newest_whole("run", said.append)
    assert kept is not None and kept.state.steps == 2
    assert len(said) == 1 and names(store) == ["step-000000002-a"]
    saved(store, 3, 4, 9, 11, start="b", keep_last=2, keep_best=0)
    assert names(store) == ["step-000000009-b", "step-000000011-b"]


def test_a_file_that_cannot_be_read_for_a_moment_damages_nothing(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: object) -> str:
        raise OSError("slow down")

    saved(store, 1, 2)
    with monkeypatch.context() as context:
        context.setattr("raydistil.checkpoint.digest_of", fail)
        with pytest.raises(OSError, match="slow down"):
            store.newest_whole("run", pytest.fail)
    assert names(store) == ["step-000000001-a", "step-000000002-a"]


def test_workers_that_should_be_dead_harm_nobody(store: CheckpointStore) -> None:
    """Of an earlier start, who save the same step once more."""
    saved(store, 2, start="a")
    saved(store, 2, 3, start="b", keep_last=9)
    assert names(store) == ["step-000000002-a", "step-000000002-b", "step-000000003-b"]


def test_what_is_not_complete_is_not_there_and_swept_away(store: CheckpointStore) -> None:
    saved(store, 1, 2)
    filesystem, root = store.open()
    filesystem.delete_file(f"{root}/step-000000002-a/{STATE}")
    assert names(store) == ["step-000000001-a"]
    store.sweep()
    saved(store, 1, start="b")
    store.remove_all()
    assert store.newest() is None


def test_a_damaged_one_is_named_and_the_one_before_is_taken(store: CheckpointStore) -> None:
    saved(store, 1, 2)
    store.write("step-000000002-a/deepspeed/rank-0", b"half of it")
    said: list[str] = []
    kept = store.newest_whole("run", said.append)
    assert kept is not None and kept.state.steps == 1
    assert said == ["checkpoint step-000000002-a is damaged (deepspeed/rank-0 is not what was written): going on from "
                    "the one before"]  # fmt: skip
    filesystem, root = store.open()
    filesystem.delete_file(f"{root}/step-000000001-a/latest")
    with pytest.raises(StorageError, match="got damaged ones only, step-000000001-a: remove them"):
        store.newest_whole("run", said.append)


def test_those_of_another_run_are_refused(store: CheckpointStore) -> None:
    saved(store, 1)
    with pytest.raises(StorageError, match=r"expected checkpoints of this run in .*, got those of another one"):
        store.newest_whole("other", pytest.fail)


def test_a_checkpoint_is_there_when_all_workers_have_brought_theirs(store: CheckpointStore) -> None:
    first, second = (Saver(store, CheckpointsConfig(), rank, 2, "a") for rank in range(2))
    first.save(Engine(1, 0), "tokens", state(1))
    time.sleep(0.3)
    first.look()
    assert store.newest() is None
    second.save(Engine(1, 1), "tokens", state(1))
    second.wait()
    first.wait()
    kept = store.newest_whole("run", pytest.fail)
    assert kept is not None and {"deepspeed/rank-0", "deepspeed/rank-1"} <= set(kept.state.files)


def test_a_worker_that_never_brings_its_part_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydistil.saving.OTHERS_S", 0.2)
    saver = Saver(CheckpointStore(str(tmp_path), "distill"), CheckpointsConfig(), 0, 2, "a")
    saver.save(Engine(1), "tokens", state(1))
    with pytest.raises(StorageError, match=r"got nothing from worker 1 .*: set checkpoints\.storage to one"):
        saver.wait()


def test_a_place_that_is_none_is_named() -> None:
    with pytest.raises(StorageError, match=r"expected checkpoints\.storage to be a place to write to, got .*nowhere"):
        CheckpointStore("nowhere://x", "distill").open()


def test_a_full_disk_leaves_the_last_one_as_it_was(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 5 << 19):
        store = CheckpointStore(str(tmp_path / "disk"), "distill")
        saved(store, 1)
        saver = Saver(store, CheckpointsConfig(), 0, 1, "b")
        with pytest.raises(FullError, match=r"no space left for a checkpoint in .*; the last one is as it was"):
            saver.save(Big(2), "tokens", state(2))
        kept = store.newest_whole("run", pytest.fail)
        assert kept is not None and kept.state.steps == 1
        assert [path.name for path in (tmp_path / "disk" / "distill").iterdir()] == [kept.name]


class Big(Engine):
    def save_checkpoint(self, folder: str, tag: str) -> None:
        super().save_checkpoint(folder, tag)
        Path(folder, tag, "moments").write_bytes(bytes(1 << 20))


def test_the_state_reads_as_json(tmp_path: Path) -> None:
    saved(CheckpointStore(str(tmp_path), "distill"), 1)
    fields = json.loads((tmp_path / "distill/step-000000001-a" / STATE).read_text())
    assert fields["ledger"] == {"ranges": [[0, 2]]} and fields["config"] == {"seed": 0}
