"""The driver's side of one training."""

from types import SimpleNamespace
from typing import Any

import pytest

from raydistil.train import spinning


@pytest.mark.parametrize(
    ("shared", "said", "expected"),
    [
        (True, {}, {"GOMP_SPINCOUNT": "1000"}),
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
