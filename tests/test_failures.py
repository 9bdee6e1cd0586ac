"""Processes are killed, for real: nothing is lost, nothing is trained on twice, and the weights are the same."""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from conftest import write_jsonl
from disks import small_disk
from safetensors.torch import load_file
from test_pipeline import LANGUAGE_MODEL, config_for, quiet

from raydistil import pipeline, rundir
from raydistil.config import Config
from raydistil.config.checkpoints import CheckpointsConfig
from raydistil.errors import DivergedError, FailedError, FullError
from raydistil.trace import Record, audit, history, read_trace

STUDENT, TEACHER = "ray::RayTrainWorker", "ray::MapWorker"
EVERY_MIN = 0.005


def killed_config(folder: Path, teacher: str, corpus: Path, name: str, **cluster: Any) -> Config:
    shape: dict[str, Any] = {**LANGUAGE_MODEL, "evaluate": None, "cluster": {"trace": True, **cluster}}
    shape["checkpoints"] = {"every_min": EVERY_MIN}
    return config_for(folder, teacher, corpus, name=name, distill={"epochs": 18, "dropout": 0.1}, **shape)


@contextmanager
def killing(config: Config, *kills: tuple[str, int], blow: int = signal.SIGKILL) -> Iterator[list[int]]:
    """In the background: SIGKILL (or `blow`) to one process of a kind as soon as workers that started after the kill
    before have made a step; yields whom it met."""
    met: list[int] = []
    over = threading.Event()

    def watch() -> None:
        killed_s = 0.0
        for kind, step in kills:
            while not over.is_set() and not any(r.step >= step and r.asked_s > killed_s for r in _traced(config)):
                time.sleep(0.05)
            met.append(_kill_one(kind, met, over, blow))
            killed_s = time.time()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield met
    finally:
        over.set()
        thread.join()


def _kill_one(kind: str, met: list[int], over: threading.Event, blow: int) -> int:
    """One that was not met before, of this process's own cluster."""
    while not over.is_set():
        for process in psutil.Process().children(recursive=True):
            if process.pid not in met and _name(process).startswith(kind):
                os.kill(process.pid, blow)
                return process.pid
        time.sleep(0.05)
    return 0


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _traced(config: Config) -> list[Record]:
    return read_trace(config.run_dir, rundir.DISTILL)


def audited(config: Config) -> list[Record]:
    """The history, in which every micro-batch of the manifest stands once."""
    found = audit(_traced(config), _expected(config))
    assert (found.lost, found.duplicated, found.trained) == ([], [], found.expected)
    return history(_traced(config))


def _expected(config: Config) -> int:
    rows = rundir.read_summary(config.run_dir, rundir.DISTILL)
    assert rows is not None and config.distill is not None
    return int(-(-rows["rows"] // config.distill.micro_batch_size) * config.distill.epochs)


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load_file(config.run_dir / rundir.STUDENT / "model.safetensors")


@pytest.fixture(scope="module")
def whole(
    ray_cluster: None, tiny_teacher: str, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """What becomes of it when nobody is killed."""
    config = killed_config(tmp_path_factory.mktemp("whole"), tiny_teacher, corpus_file, "whole")
    pipeline.run_all(config, quiet)
    assert len({record.began_s for record in audited(config)}) == 1
    return weights(config)


@pytest.mark.slow
def test_one_worker_ends_with_the_same_weights(
    whole: dict[str, torch.Tensor], tiny_teacher: str, corpus_file: Path, tmp_path: Path
) -> None:
    """Whose teacher is killed too, which stops nothing."""
    config = killed_config(tmp_path, tiny_teacher, corpus_file, "run")
    with killing(config, (TEACHER, 10), (STUDENT, 40), (TEACHER, 60), (STUDENT, 80)) as met:
        pipeline.run_all(config, quiet)
    assert len(met) == 4 and all(met)
    records = audited(config)
    assert len({record.began_s for record in _traced(config)}) == 3
    assert len({timing.teacher for record in _traced(config) for timing in record.taught}) >= 3
    assert [record.step for record in records] == sorted(record.step for record in records)
    assert all(torch.equal(weight, whole[name]) for name, weight in weights(config).items())


@pytest.mark.long
def test_an_object_store_that_somebody_else_fills(
    whole: dict[str, torch.Tensor], tiny_teacher: str, corpus_file: Path, tmp_path: Path
) -> None:
    """What has no room goes to a disk and comes back, and is counted."""
    config = killed_config(tmp_path, tiny_teacher, corpus_file, "run")
    with filling(config):
        pipeline.run_all(config, quiet)
    audited(config)
    summary = rundir.read_summary(config.run_dir, rundir.DISTILL)
    assert summary is not None and summary["spilled_bytes"] > 0
    assert all(torch.equal(weight, whole[name]) for name, weight in weights(config).items())


@contextmanager
def filling(config: Config) -> Iterator[None]:
    """In the background, when the student is at work: more objects than the store has room for."""
    held: list[Any] = []

    def fill() -> None:
        while not _traced(config):
            time.sleep(0.05)
        room = int(ray.cluster_resources()["object_store_memory"])
        piece = np.zeros(64 << 20, np.uint8)
        held.extend(ray.put(piece) for _ in range(-(-room * 5 // 4 // piece.nbytes)))  # there until the block ends

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed(
    ray_cluster: None, tiny_teacher: str, corpus_file: Path, tmp_path: Path
) -> None:
    config = killed_config(tmp_path, tiny_teacher, corpus_file, "two", students=2)
    with killing(config, (STUDENT, 20)) as met:
        pipeline.run_all(config, quiet)
    assert len(met) == 1 and all(met)
    by_step: dict[int, set[int]] = {}
    for record in audited(config):
        by_step.setdefault(record.step, set()).add(record.index)
    assert all(indices == {2 * step - 2, 2 * step - 1} for step, indices in by_step.items())


@pytest.mark.slow
def test_a_worker_that_dies_again_and_again_is_given_up(
    ray_cluster: None, tiny_teacher: str, corpus_file: Path, tmp_path: Path
) -> None:
    config = killed_config(tmp_path, tiny_teacher, corpus_file, "hopeless", max_failures=1)
    seldom = config.model_copy(update={"checkpoints": CheckpointsConfig()})
    with killing(seldom, (STUDENT, 1), (STUDENT, 1)), pytest.raises(FailedError, match="within 2 starts from step 0"):
        pipeline.run_all(seldom, quiet)


@pytest.mark.slow
def test_a_teacher_that_never_lives_through_its_work_is_given_up(
    ray_cluster: None, tiny_teacher: str, corpus_file: Path, tmp_path: Path
) -> None:
    """Killed while it loads, as for its memory: each a little later, until it could say that it is there. A step of the
    student takes far longer than any of them lives.
    """
    config = killed_config(tmp_path, tiny_teacher, corpus_file, "teacherless", max_failures=1)
    assert config.distill is not None
    config = config.model_copy(update={"distill": config.distill.model_copy(update={"accumulation": 90})})
    met: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            for process in psutil.Process().children(recursive=True):
                if _name(process).startswith(TEACHER) and time.time() - process.create_time() > 0.05 * len(met):
                    process.kill()
                    met.append(process.pid)
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        with pytest.raises(
            FailedError, match=r"one died 2 times without a step of the student between|within 2 starts"
        ):
            pipeline.run_all(config, quiet)
    finally:
        over.set()
        thread.join()
    assert len(met) >= 2


@pytest.mark.slow
def test_what_a_worker_could_say_is_kept(
    ray_cluster: None, tiny_teacher: str, corpus_file: Path, tmp_path: Path
) -> None:
    """Of a DeepSpeed that does not take its configuration."""
    config = killed_config(tmp_path, tiny_teacher, corpus_file, "said", max_failures=0)
    assert config.distill is not None
    wrong = config.distill.model_copy(update={"deepspeed": {"optimizer": {"type": "NoSuch"}}})
    with pytest.raises(FailedError, match=r"within 1 starts from step 0, .*distill-failures.txt"):
        pipeline.run_all(config.model_copy(update={"distill": wrong}), quiet)
    assert "Traceback" in (config.run_dir / "distill-failures.txt").read_text()


@pytest.mark.long
def test_a_worker_that_hangs_is_taken_for_dead(
    ray_cluster: None, tiny_teacher: str, corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the other one waits for it in a collective."""
    config = killed_config(tmp_path, tiny_teacher, corpus_file, "hangs", students=2, hang_timeout_s=8)
    with killing(config, (STUDENT, 20), blow=signal.SIGSTOP) as met:
        pipeline.run_all(config, quiet)
    assert len(met) == 1 and all(met)
    assert not psutil.pid_exists(met[0])
    assert len({record.began_s for record in audited(config)}) == 2
    assert "the workers died" in capsys.readouterr().err


def poisoned(folder: Path, teacher: str, most: int) -> Config:
    """Numbers to learn, of which one makes the loss infinite, once an epoch."""
    rows = [{"text": f"item {number} is iron and gold", "label": float(number % 7)} for number in range(64)]
    rows[5]["label"] = 3e38
    corpus = write_jsonl(folder / "numbers.jsonl", rows)
    return config_for(
        folder, teacher, corpus, name=f"most-{most}", task="regression",
        corpus={"labelled_share": 1.0, "test_share": 0.0},
        finetune={"epochs": 2, "micro_batch_size": 8, "max_skipped_steps": most}, distill=None, evaluate=None,
    )  # fmt: skip


@pytest.mark.slow
def test_a_step_whose_loss_is_no_number_is_left_out_and_named_up_to_a_limit(
    ray_cluster: None, tiny_teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = poisoned(tmp_path, tiny_teacher, 2)
    pipeline.run_stage(config, "finetune", quiet)
    summary = rundir.read_summary(config.run_dir, "finetune")
    assert summary is not None and (summary["steps"], summary["skipped_steps"]) == (16, 2)
    said = re.findall(r"nan or inf in step (\d+) of 16 \(micro-batches (\d+)\): skipped", capsys.readouterr().err)
    assert len(said) == 2 and all(int(step) == int(index) + 1 for step, index in said)
    last = rf"got nan or inf in step {said[1][0]} of 16 \(micro-batches {said[1][1]}\), after 1 that were skipped"
    with pytest.raises(DivergedError, match=last):
        pipeline.run_stage(poisoned(tmp_path, tiny_teacher, 1), "finetune", quiet)


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_the_last_checkpoint(
    ray_cluster: None, tiny_teacher: str, corpus_file: Path, tmp_path: Path
) -> None:
    """With room for one and not for two, and then for all: the run goes on from the one."""
    disk = tmp_path / "disk"
    config = killed_config(tmp_path, tiny_teacher, corpus_file, "full", max_failures=0)
    small = config.model_copy(update={"checkpoints": CheckpointsConfig(every_steps=20, storage=str(disk))})
    with small_disk(disk, 30 << 20):
        with pytest.raises(FullError, match=f"no space left for a checkpoint in {disk}; the last one is as it was"):
            pipeline.run_all(small, quiet)
        kept = rundir.checkpoints_of(small, rundir.DISTILL).newest()
        assert kept is not None and kept.state.steps == 20
        subprocess.run(["mount", "-o", "remount,size=500m", str(disk)], check=True)
        pipeline.run_all(small, quiet)
    assert audited(small)[0].step == 1
    assert {record.from_step for record in _traced(small)} == {0, 20}
