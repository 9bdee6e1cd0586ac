"""A few steps before a run: what they say of who will be slower."""

from pathlib import Path

import pytest
from test_pipeline import LANGUAGE_MODEL, config_for

from raydistil.probe import Probe, probe


@pytest.mark.parametrize(
    ("teachers", "students", "expected"),
    [(1, 1, "student-bound"), (1, 2, "balanced"), (1, 3, "teacher-bound"), (2, 3, "student-bound")],
)
def test_the_verdict_is_that_of_the_rates_together(teachers: int, students: int, expected: str) -> None:
    found = Probe(steps=20, teacher_tok_s=2000.0, student_tok_s=1000.0, bytes_per_token=776.0, shared=False)
    assert found.verdict(teachers, students) == expected
    assert found.tok_s(teachers, students) == min(2000.0 * teachers, 1000.0 * students)


def test_on_the_same_cores_one_works_after_the_other() -> None:
    found = Probe(steps=20, teacher_tok_s=3000.0, student_tok_s=1500.0, bytes_per_token=776.0, shared=True)
    assert found.verdict(1, 1) == "balanced"
    assert found.tok_s(1, 1) == pytest.approx(1000.0)


@pytest.mark.parametrize("task", ["classification", "mlm"])
def test_a_probe_trains_no_run(
    task: str, tiny_teacher: str, corpus_file: Path, tmp_path: Path, one_thread: None
) -> None:  # fmt: skip
    """With a teacher that is yet to be fine-tuned, or an ensemble of them; nothing of it stays."""
    changes = LANGUAGE_MODEL if task == "mlm" else {"ensemble": [{"model": tiny_teacher}]}
    config = config_for(tmp_path / "runs", tiny_teacher, corpus_file, **changes)
    found = probe(config, 60)
    assert found is not None
    assert min(found.teacher_tok_s, found.student_tok_s) > 0
    assert task != "mlm" or 2 * 32 + 8 <= found.bytes_per_token < 2 * 32 + 16  # a state, the token and its label
    assert not config.run_dir.exists()


def test_without_a_distillation_there_is_nothing_to_probe(tiny_teacher: str, corpus_file: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path, tiny_teacher, corpus_file, distill=None, evaluate=None)
    assert probe(config, 60) is None
    loss = {"kd": 0.0, "task": 1.0, "cosine": 0.0, "hidden": {"weight": 0.0}}
    silent = config_for(tmp_path, tiny_teacher, corpus_file, distill={"epochs": 1, "loss": loss})
    assert probe(silent, 60) is None
