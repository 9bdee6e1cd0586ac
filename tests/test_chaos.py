"""What becomes of a run whose processes and nodes are killed, and whether the audit would tell."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raydistil.bench.chaos import QUICK, audit_control
from raydistil.trace import Record, audit


def test_an_audit_that_would_see_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [Record(step, step - 1, 2, 10, 100, 0.0, 0.0, 0.0, (), 1.0, 0) for step in range(1, 9)]
    found = audit(records, 8)
    assert audit_control(records, found, seed=3)
    monkeypatch.setattr("raydistil.bench.chaos.audit", lambda spoilt, expected: found)
    assert not audit_control(records, found, seed=3)


@pytest.mark.long
def test_teacher_student_node_and_driver_are_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "raydistil", "bench", "chaos", "--quick", "--json", f"--output={tmp_path}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["passed"]
    assert (result["lost"], result["duplicated"], result["audit_control"]) == (0, 0, True)
    assert result["kills_by_kind"] == QUICK and result["resumes"] == QUICK["driver"]
    assert result["positions_trained"] == result["positions_expected"]
    assert (
        result["same_weights"] and result["same_steps"] and result["final_loss"] == result["uninterrupted_final_loss"]
    )
