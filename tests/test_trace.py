"""What a run leaves of every micro-batch, and what is read out of it."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from test_pipeline import LANGUAGE_MODEL, config_for, quiet

from raydistil import pipeline, rundir
from raydistil.bench.window import window_of
from raydistil.errors import ConfigError
from raydistil.payload import payload_path
from raydistil.report import overlap
from raydistil.steps import FILLER
from raydistil.trace import Audit, Record, Trace, audit, history, read_trace, trace_path
from raydistil.types import TeacherTiming


def record(index: int, ended: float, taught: float, wait: float = 0.0) -> Record:
    """Trained in the half second before `ended`, taught in the one before `taught`."""
    timing = TeacherTiming("a", taught - 0.5, taught, 100)
    return Record(index + 1, index, 4, 100, 800, ended - 0.5 - wait, ended - 0.5, ended, (timing,))


def test_a_trace_comes_back_in_the_order_of_the_ends(tmp_path: Path) -> None:
    records = [record(index, index + 2.0, index + 1.0) for index in range(4)]
    for rank in (0, 1):
        trace = Trace(trace_path(tmp_path, "distill", rank))
        for one in records[rank::2]:
            trace.add(one)
    Trace(trace_path(tmp_path, "finetune", 0)).add(records[0])
    assert read_trace(tmp_path, "distill") == records


def test_what_is_added_is_there_at_once_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    path, first = trace_path(tmp_path, "distill", 0), record(0, 2.0, 1.0)
    trace = Trace(path)
    trace.add(first)
    path.write_text(path.read_text() + '{"step": 2, "ind')
    assert read_trace(tmp_path, "distill") == [first]


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    Trace(None).add(record(0, 2.0, 1.0))
    assert list(tmp_path.iterdir()) == []


def test_a_window_begins_after_the_warm_up_and_ends_with_the_teacher() -> None:
    """One micro-batch a second; the teacher is three ahead, so the last two ends come after its own."""
    records = [record(index, index + 3.0, index + 1.0, wait=0.25) for index in range(10)]
    window = window_of(records, 2)
    assert (window.student_rows, window.teacher_rows, window.balance) == (24, 24, 1.0)
    assert (window.tokens, window.seconds, window.tok_s) == (600, 6.0, 100.0)
    assert (window.wait_s, window.num_bytes) == (6 * 0.25, 4800)


def test_a_teacher_that_ran_ahead_shows_in_the_balance() -> None:
    """The teacher makes two rows while the student takes one, until it is through."""
    records = [record(index, index + 3.0, 1.0 + index / 2) for index in range(10)]
    window = window_of(records, 1)
    assert (window.student_rows, window.teacher_rows, window.balance) == (8, 16, 2.0)


def test_a_stream_that_is_too_short_for_a_window() -> None:
    with pytest.raises(ConfigError, match="raise --texts or --seconds"):
        window_of([record(index, index + 3.0, 1.0) for index in range(10)], 2)


@pytest.mark.slow
def test_a_traced_run(ray_cluster: None, tiny_teacher: str, corpus_file: Path, tmp_path: Path) -> None:
    """Every position once, one teacher, at work at the student's time, nothing but references through the driver."""
    changes = {**LANGUAGE_MODEL, "evaluate": None, "cluster": {"trace": True, "max_bytes_in_flight": 1 << 20}}
    config = config_for(tmp_path, tiny_teacher, corpus_file, **changes, distill={"epochs": 6})
    pipeline.run_all(config, quiet)
    records = read_trace(config.run_dir, rundir.DISTILL)
    summary = rundir.read_summary(config.run_dir, rundir.DISTILL)
    assert summary is not None
    assert Counter(one.index for one in records) == Counter(range(summary["micro_batches"]))
    assert [one.step for one in records] == list(range(1, summary["steps"] + 1))
    assert len({timing.teacher for one in records for timing in one.taught}) == summary["teacher_builds"] == 1
    busy = [(one.started_s, one.ended_s) for one in records]
    assert overlap(busy, [(timing.started_s, timing.ended_s) for one in records for timing in one.taught]) > 0
    assert sum(one.num_bytes for one in records) == summary["wire_bytes"]
    for process in ("driver", "scheduler"):
        counts = json.loads(payload_path(config.run_dir, rundir.DISTILL, process).read_text())
        assert counts["num_bytes"] == 0 < counts["control"]


def done(step: int, index: int, began_s: float, from_step: int = 0) -> Record:
    return Record(step, index, 2, 10, 100, 0.0, 0.0, 0.0, (), began_s, from_step)


FIRST = [done(step, step - 1, 1.0) for step in (1, 2, 3)]
SECOND = [done(step, step - 1, 2.0, 1) for step in (2, 3, 4, 5)]
THIRD = [done(step, step - 1, 3.0, 4) for step in (5, 6)]


def test_the_history_is_what_the_last_workers_built_upon() -> None:
    """The first are killed in their third step, the second start from a checkpoint of one step, the third of four."""
    assert history(FIRST + SECOND + THIRD) == [*FIRST[:1], *SECOND[:3], *THIRD]
    assert history(FIRST) == FIRST
    assert history([]) == []
    assert audit(FIRST + SECOND + THIRD, 6) == Audit(6, 6, [], [], 3)


def test_an_audit_finds_what_is_lost_and_what_is_there_twice() -> None:
    """Where workers go on from a step that nobody made, too, though the ones before made it after the checkpoint."""
    assert audit(FIRST + SECOND + THIRD, 7).lost == [6]
    assert audit(FIRST + [one for one in SECOND if one.step > 2] + THIRD, 6).lost == [1]
    twice = [done(2, 0, 1.0) if one.step == 2 else one for one in FIRST]
    assert audit(twice, 3) == Audit(3, 3, [1], [0], 0)
    assert audit([*FIRST, replace(done(3, FILLER, 1.0), num_rows=0)], 3) == Audit(3, 3, [], [], 0)
