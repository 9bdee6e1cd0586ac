"""What a run says of itself."""

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st

from raydistil.errors import DivergedError, FailedError
from raydistil.progress import Progress, Wish
from raydistil.report import Interval, LiveLine, Meter, Overlap, format_step, overlap
from raydistil.tally import Tally, Used, advice
from raydistil.trace import Record
from raydistil.types import StepMetrics, TeacherTiming

INTERVALS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 15)).map(lambda p: (p[0], p[0] + p[1])), max_size=12)


def metrics(step: int = 12, **changes: Any) -> StepMetrics:
    values = {
        "step": step, "num_steps": 480, "epoch": 0.5, "losses": {"loss": 1.2345, "kd": 0.1, "task": 0.9}, "lr": 1e-4,
        "student_tok_s": 3100.0, "teacher_tok_s": 12_000.0, "wait_share": 0.254, "eta_s": 80.9,
        "queue_depth": 2.5, "bytes_per_token": 776.0, "verdict": "teacher-bound", "mfu": 0.414,
    }  # fmt: skip
    return StepMetrics(**{**values, **changes})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# ---- overlap


@given(INTERVALS, INTERVALS)
def test_overlap_is_the_time_in_both(first: list[Interval], second: list[Interval]) -> None:
    seconds = [{s for start, end in some for s in range(int(start), int(end))} for some in (first, second)]
    assert overlap(first, second) == len(seconds[0] & seconds[1])
    assert overlap(second, first) == overlap(first, second)


def test_overlap_by_hand() -> None:
    assert overlap([(0.0, 1.5), (1.0, 2.0), (5.0, 6.0)], [(1.75, 5.25), (1.9, 5.5)]) == pytest.approx(0.25 + 0.5)


@given(
    st.lists(st.tuples(st.floats(0, 3), st.floats(0, 3), st.floats(0, 1)), min_size=1, max_size=60), st.integers(0, 9)
)
def test_overlap_in_pieces_is_overlap_at_once(steps: list[tuple[float, float, float]], kept: int) -> None:
    meter, student, teacher, now = Overlap(), [], [], 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raydistil.report.KEPT", kept + 1)
        for student_s, teacher_s, lead in steps:
            student.append((now, now + student_s))
            teacher.append((now - lead, now - lead + teacher_s))
            meter.add(student[-1], teacher[-1])
            now += student_s + 1.0  # more than the lead: no interval begins before one that came earlier
    assert meter.total() == pytest.approx(overlap(student, teacher))


# ---- the meter


def test_the_meter_adds_up_what_a_worker_did() -> None:
    meter = Meter(1, 2, None, num_steps=2, first_step=0, shared=False, used=Used(5.0, lambda: 100.0))  # type: ignore[arg-type]  # only rank 0 reports
    meter.micro_step(Record(1, 0, 2, 100, 1000, 0.0, 1.0, 3.0, (TeacherTiming("a", 0.5, 2.0, 100),)))
    meter.micro_step(Record(2, 1, 2, 50, 500, 3.0, 3.5, 5.0, (TeacherTiming("b", 1.5, 4.0, 50),)))
    meter.step(1, 0.5, {}, 1e-3)
    summary = meter.summary(interrupted=True, skipped_steps=0)
    assert (summary.steps, summary.micro_batches, summary.tokens, summary.wire_bytes) == (1, 2, 150, 1500)
    assert (summary.wait_s, summary.student_busy_s, summary.teacher_busy_s) == (1.5, 3.5, 4.0)
    assert summary.overlap_s == 2.5  # 1 to 3 and 3.5 to 4
    assert (summary.teacher_builds, summary.interrupted, summary.mfu) == (2, True, 0.0)
    assert meter.wish() == Wish.NONE


def test_what_is_made_use_of_is_a_share_of_what_was_measured_once() -> None:
    rates = [100.0, 1.0]
    used = Used(5.0, lambda: rates.pop(0))
    assert used.share(30, 2.0) == 0.0
    for _ in range(2):
        used.measure()
    assert used.share(30, 2.0) == 0.75  # 150 FLOPs, of the 200 that two seconds are good for


def progress(folder: Path) -> Any:
    return Progress.__ray_actor_class__(2, folder / "failures.txt")


def test_workers_that_die_again_from_the_same_step_are_refused(tmp_path: Path) -> None:
    actor = progress(tmp_path)
    assert [actor.start(step, None) for step in (0, 0, 0, 7, 7)] == [None] * 5
    actor.failed("Traceback:\n  a line\nRuntimeError: no memory\n")
    assert actor.start(7, "step-7") is None
    _, news = actor.drain()
    assert len(news) == 5 and "memory; Ray may say more in " in news[0]
    assert news[0].endswith("ray.txt): they start again from step 0")
    assert "(RuntimeError: no memory; the whole of it is in" in news[-1]
    with pytest.raises(FailedError, match=r"3 starts from step 7, .* \(killed, perhaps for their memory; .*ray.txt\)"):
        raise actor.start(7, "step-7")
    assert isinstance(actor.start(8, "step-8"), FailedError)  # it stays so
    assert "a line" in (tmp_path / "failures.txt").read_text()


def test_all_workers_of_a_start_go_by_one_name_that_no_other_start_has(tmp_path: Path) -> None:
    actor = progress(tmp_path)
    actor.start(0, None)
    (none, first), again = actor.started(), actor.started()
    actor.start(3, "step-3")
    kept, second = actor.started()
    assert (none, kept, again) == (None, "step-3", (None, first))
    assert first != second


def test_a_wish_for_a_checkpoint_is_told_once_and_one_to_stop_stays(tmp_path: Path) -> None:
    actor = progress(tmp_path)
    actor.wish(Wish.SAVE)
    assert [actor.push({}) for _ in range(2)] == [Wish.SAVE, Wish.NONE]
    actor.wish(Wish.STOP)
    actor.wish(Wish.SAVE)
    assert [actor.push({}) for _ in range(2)] == [Wish.STOP, Wish.STOP]
    assert actor.drain() == ([{}] * 4, [])


def test_the_first_reason_to_stop_counts(tmp_path: Path) -> None:
    actor = progress(tmp_path)
    for text in ("lower lr", "some other"):
        actor.refuse(DivergedError(text))
    assert str(actor.start(0, None)) == str(actor.outcome()[1]) == "lower lr"


def test_a_wish_is_heard_however_long_a_step_takes(ray_cluster: None, tmp_path: Path) -> None:
    """Every step is pushed, and the answer comes while the next one is made."""
    actor: Any = Progress.remote(2, tmp_path / "failures.txt")  # type: ignore[attr-defined]
    meter = Meter(0, 1, actor, num_steps=9, first_step=0, shared=False, used=Used(5.0, lambda: 100.0))
    losses = {"loss": torch.zeros(())}
    ray.get(actor.wish.remote(Wish.SAVE))
    heard = []
    for step in range(1, 4):
        time.sleep(0.6)
        meter.step(step, 0.5, losses, 1e-3)
        heard.append(meter.wish())
    ray.kill(actor)
    assert sorted(heard) == [Wish.NONE, Wish.NONE, Wish.SAVE]


def tally(wait: float, taught: float) -> Tally:
    """Micro-batches of one second each, of which the student waits for `wait`, the teacher works for `taught`.

    Before the first one the student waits for a teacher that loads.
    """
    found = Tally()
    found.add(Record(1, 0, 2, 0, 0, -60.0, 0.0, 0.0, (TeacherTiming("a.0", 0.0, 0.0, 0),)))
    for start in range(4):
        timing = TeacherTiming("a.0", start - taught - 2.0, start - 2.0, 100)
        found.add(Record(start + 1, start, 2, 100, 1000, start, start + wait, start + 1.0, (timing,)))
    return found


@pytest.mark.parametrize(
    ("wait", "taught", "expected"),
    [(0.5, 1.0, "teacher-bound"), (0.0, 0.5, "student-bound"), (0.04, 0.9, "balanced")],
)
def test_who_holds_the_stream_up(wait: float, taught: float, expected: str) -> None:
    assert tally(wait, taught).verdict(4.0, shared=False) == expected
    assert Tally().verdict(4.0, shared=False) is None


def test_on_the_same_cores_no_one_waits_for_a_teacher_that_is_too_slow() -> None:
    assert tally(0.5, 1.0).verdict(4.0, shared=True) == "balanced"
    assert tally(0.0, 0.5).verdict(4.0, shared=True) == "student-bound"
    assert "more cluster.teachers" in advice("teacher-bound", shared=False)
    assert "the same cores" in advice("balanced", shared=True)


def test_a_teacher_of_two_lanes_is_one_that_is_twice_as_fast() -> None:
    found = Tally()
    for start in range(4):
        timing = TeacherTiming(f"a.{start % 2}", start / 2, start / 2 + 1.0, 100)
        found.add(Record(start + 1, start, 2, 100, 1000, start, start, start + 1.0, (timing,)))
    assert (found.teachers, found.teacher_tok_s) == ({"a"}, 200.0)


def test_a_teacher_that_is_gone_is_not_one_with_time_to_spare() -> None:
    found = Tally()
    for start in range(100):
        timing = TeacherTiming("first.0" if start < 10 else "second.0", start - 1.0, start, 100)
        found.add(Record(start + 1, start, 2, 100, 1000, start, start, start + 1.0, (timing,)))
    assert found.teacher_tok_s == 100.0
    assert found.verdict(100.0, shared=False) == "balanced"


def test_teachers_of_several_students_work_for_all_of_them() -> None:
    """One sees every other micro-batch alone."""
    found = Tally(workers=2)
    for start in range(0, 20, 2):
        timing = TeacherTiming("a.0", start - 1.0, start, 100)
        found.add(Record(start + 1, start, 2, 100, 1000, start, start, start + 2.0, (timing,)))
    assert found.verdict(20.0, shared=False) == "balanced"


def test_rates_and_what_lies_ready() -> None:
    found = tally(0.0, 0.5)
    assert found.teacher_tok_s == 200.0
    assert found.queue_depth(4.0) == 2.0
    assert Tally().teacher_tok_s == 0.0


# ---- lines


def test_a_step_on_one_line() -> None:
    expected = "step 12/480 | loss 1.234 (kd 0.100 task 0.900) | student 3.1k tok/s | teacher 12.0k tok/s | wait 25%"
    assert format_step(metrics()) == f"{expected} | MFU 41% | teacher-bound | ETA 1:20"


def test_a_step_without_teacher_and_with_hours_to_go() -> None:
    line = format_step(metrics(teacher_tok_s=0.0, verdict=None, eta_s=3600.0, losses={"loss": 2.0, "task": 2.0}))
    assert line == "step 12/480 | loss 2.000 (task 2.000) | student 3.1k tok/s | wait 25% | MFU 41% | ETA 60:00"


def test_a_terminal_has_one_line_that_is_rewritten(tmp_path: Path) -> None:
    out = Terminal()
    live = LiveLine("distill", tmp_path / "metrics.jsonl", out)
    for step in (1, 2):
        live.show(metrics(step))
    live.close()
    live.close()
    lines = [f"\r\x1b[Kdistill     {format_step(metrics(step))}" for step in (1, 2)]
    assert out.getvalue() == "".join(lines) + "\n"


def test_elsewhere_a_plain_line_is_shown_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    out = io.StringIO()
    live = LiveLine("distill", tmp_path / "metrics.jsonl", out)
    for step in (1, 2, 480):
        live.show(metrics(step))
    live.close()
    assert out.getvalue().splitlines() == [f"distill     {format_step(metrics(step))}" for step in (1, 480)]


def test_every_step_goes_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for stage in ("finetune", "distill"):
        live = LiveLine(stage, path, io.StringIO())
        for step in (1, 2):
            live.show(metrics(step))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("finetune", 1), ("finetune", 2), ("distill", 1), ("distill", 2),
    ]  # fmt: skip
    assert lines[0]["losses"] == {"loss": 1.2345, "kd": 0.1, "task": 0.9}
