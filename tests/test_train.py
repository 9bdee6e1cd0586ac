"""The driver's side of a training."""

from types import SimpleNamespace
from typing import Any

import pytest

from raydistil.plan import Need
from raydistil.train import QUIET_S, Silence, spinning


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
