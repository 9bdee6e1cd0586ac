"""Processes are killed, for real: nothing is lost, nothing is trained on twice, and the weights are the same."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import LANGUAGE_MODEL, config_for, quiet

from raydistil import pipeline, rundir
from raydistil.config import Config
from raydistil.config.checkpoints import CheckpointsConfig
from raydistil.errors import FailedError
from raydistil.trace import Record, audit, history, read_trace

STUDENT, TEACHER = "ray::RayTrainWorker", "ray::MapWorker"
EVERY_MIN = 0.005


def killed_config(folder: Path, teacher: str, corpus: Path, name: str, **cluster: Any) -> Config:
    shape: dict[str, Any] = {**LANGUAGE_MODEL, "evaluate": None, "cluster": {"trace": True, **cluster}}
    shape["checkpoints"] = {"every_min": EVERY_MIN}
    return config_for(folder, teacher, corpus, name=name, distill={"epochs": 12, "dropout": 0.1}, **shape)


@contextmanager
def killing(config: Config, *kills: tuple[str, int]) -> Iterator[list[int]]:
    """In the background: SIGKILL to one process of a kind as soon as workers that started after the kill before have
    made a step; yields whom it met."""
    met: list[int] = []
    over = threading.Event()

    def watch() -> None:
        killed_s = 0.0
        for kind, step in kills:
            while not over.is_set() and not any(r.step >= step and r.asked_s > killed_s for r in _traced(config)):
                time.sleep(0.05)
            met.append(_kill_one(kind, met, over))
            killed_s = time.time()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield met
    finally:
        over.set()
        thread.join()


def _kill_one(kind: str, met: list[int], over: threading.Event) -> int:
    """One that was not met before, of this process's own cluster."""
    while not over.is_set():
        for process in psutil.Process().children(recursive=True):
            if process.pid not in met and _name(process).startswith(kind):
                os.kill(process.pid, signal.SIGKILL)
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
