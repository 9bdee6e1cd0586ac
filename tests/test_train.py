"""The driver's side of a training."""

import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_checkpoint import saved

from raydistil import train as driving
from raydistil.checkpoint import CheckpointStore
from raydistil.config.checkpoints import CheckpointsConfig
from raydistil.errors import Interrupted
from raydistil.plan import Need
from raydistil.train import QUIET_S, Silence, _stop_on_signal, spinning, train


@pytest.mark.parametrize(
    ("shared", "said", "expected"),
    [
        (True, {}, {"GOMP_SPINCOUNT": "5000"}),
        (False, {}, {}),
        (True, {"GOMP_SPINCOUNT": "7"}, {}),
        (True, {"OMP_WAIT_POLICY": "active"}, {}),
    ],
)
def test_a_student_s_threads_let_go_of_cores_that_teachers_wait_for(
    monkeypatch: pytest.MonkeyPatch, shared: bool, said: dict[str, str], expected: dict[str, str]
) -> None:
    for key in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(key, raising=False)
    for key, value in said.items():
        monkeypatch.setenv(key, value)
    worker: Any = SimpleNamespace(shares_cores=shared)
    assert spinning(worker) == expected


def lines(silence: Silence, heard: bool, *times_s: float) -> list[str]:
    return [line for now_s in times_s for line in silence.look(heard, now_s)]


def test_a_silence_is_broken_each_time_it_lasted_twice_as_long(ray_cluster: None) -> None:
    silence = Silence(Need(1, 1.0, 0.0, 1, 1.0, 0.0))
    assert lines(silence, True, 0.0) == []
    assert lines(silence, False, QUIET_S - 1) == []
    (said,) = lines(silence, False, QUIET_S, QUIET_S + 1, 2 * QUIET_S - 1)
    assert said.startswith("no step for 120 s: the cluster is large enough for the run")
    assert len(lines(silence, False, 2 * QUIET_S, 4 * QUIET_S - 1, 4 * QUIET_S)) == 2
    assert lines(silence, True, 5 * QUIET_S) == lines(silence, False, 6 * QUIET_S - 1) == []


def test_a_cluster_that_cannot_hold_the_run_any_more_is_the_reason(ray_cluster: None) -> None:
    silence = Silence(Need(1, 1.0, 0.0, 999, 1.0, 0.0))
    (said,) = lines(silence, False, 0.0, QUIET_S)
    assert "expected a cluster that holds the run (CPUs: 1 students x 1 + 999 teachers x 1" in said
    assert said.endswith("it goes on when they are there")


class Actor:
    """Of whom it is noted what he was asked."""

    def __init__(self) -> None:
        self.wishes: list[Any] = []
        self.wish = SimpleNamespace(remote=self.wishes.append)
        self.outcome = SimpleNamespace(remote=lambda: (None, None, 2))  # nobody said anything, of two starts


def test_a_signal_is_remembered_when_there_is_nothing_left_to_stop(capfd: pytest.CaptureFixture[str]) -> None:
    with _stop_on_signal(actor := Actor()) as asked:
        assert not asked.is_set()
        signal.raise_signal(signal.SIGTERM)
        assert asked.is_set() and len(actor.wishes) == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("asked", [False, True])
def test_a_model_whose_last_checkpoint_is_there_comes_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """Where the workers died before they could say so, too; and what was to stop does so then."""
    store, recorded = CheckpointStore(str(tmp_path / "kept"), "distill"), list[Any]()
    save = SimpleNamespace(store=store, run_hash="run", config=CheckpointsConfig())
    source, worker = SimpleNamespace(caches=()), SimpleNamespace(num_steps=3, teachers=(), traced=())
    run: Any = SimpleNamespace(
        save=save, source=source, worker=worker, stage="distill", cluster=None, run_dir=tmp_path
    )  # fmt: skip
    actor = Actor()

    def fit(*_: Any) -> None:
        saved(store, 3)
        if asked:
            signal.raise_signal(signal.SIGINT)

    def save_model(_: Any, name: str, path: Path) -> None:
        path.mkdir()
        (path / name).write_text("weights")

    monkeypatch.setattr("raydistil.saving.save_model", save_model)
    monkeypatch.setattr(driving.warm, "with_training", lambda *_: None)
    for name, stand_in in {"_progress_of": lambda _: actor, "_trainer": None, "_need": None, "_fit": fit}.items():
        monkeypatch.setattr(driving, name, stand_in or (lambda *_: None))
    monkeypatch.setattr(driving, "Store", lambda: SimpleNamespace(peak=5, spilled=lambda: None))
    monkeypatch.setattr(driving.ray, "get", lambda asked: asked)
    monkeypatch.setattr(driving.ray, "kill", lambda _: None)
    with pytest.raises(Interrupted, match="distill is done; the same command goes on") if asked else nullcontext():
        train(run, tmp_path / "home", pytest.fail, recorded.append)
    assert [(each.steps, each.restarts) for each in recorded] == [(3, 1)]
    assert (tmp_path / "home" / "tokens").is_file() and len(actor.wishes) == asked
