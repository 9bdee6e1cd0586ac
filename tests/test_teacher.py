"""The teacher's actor class: several micro-batches at once, and what comes out of it."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from sources import mlm_source

from raydistil import wire
from raydistil.config.loss import LossConfig
from raydistil.config.targets import TargetsConfig
from raydistil.source import MicroBatches
from raydistil.specs import TargetsSpec, TeacherSpec
from raydistil.teacher import Teacher, enter_lane, num_lanes


@pytest.mark.parametrize(("threads", "lanes"), [(1, 1), (2, 2), (3, 1), (4, 4), (6, 2), (7, 1), (8, 4), (64, 4)])
def test_lanes_leave_no_thread_out(threads: int, lanes: int) -> None:
    assert num_lanes(threads) == lanes


def test_micro_batches_at_once_are_what_they_are_alone(tiny_teacher: str, corpus_file: Path, tmp_path: Path) -> None:
    """Bit for bit and in their order, from as many lanes as there are."""
    source = MicroBatches(mlm_source(tmp_path, tiny_teacher))
    wanted = TargetsSpec(TargetsConfig(codec="logits"), LossConfig(), (1, 4), True, 0)
    alone = TeacherSpec(tiny_teacher, "mlm", "float32", 1, wanted)
    batches = [source.make(index) for index in range(8)]
    together = Teacher(replace(alone, threads=4))
    table = pa.concat_tables(together(wire.table_of(batches)))
    expected = list(Teacher(alone).each(batches))
    rows = [table.slice(number, 1) for number in range(8)]
    assert [wire.batch_of(row).index for row in rows] == [batch.index for batch in batches]
    for row, columns in zip(rows, expected, strict=True):
        (said,) = wire.targets_of(row)
        assert {name: bytes(part) for name, part in said.items()} == columns
    timings = [timing for row in rows for timing in wire.timings_of(row, 1)]
    assert {timing.teacher for timing in timings} == {together.name}
    assert 1 < len({timing.lane for timing in timings}) <= 4


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="the system has no idle class")
@pytest.mark.parametrize("behind", [False, True])
def test_a_lane_behind_others_is_in_the_idle_class_and_leaves_the_process_as_it_is(behind: bool) -> None:
    before, threads = os.sched_getscheduler(0), torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=enter_lane, initargs=(1, behind)) as lane:
        assert lane.submit(os.sched_getscheduler, 0).result() == (os.SCHED_IDLE if behind else before)
        assert lane.submit(torch.get_num_threads).result() == 1
    assert os.sched_getscheduler(0) == before
    torch.set_num_threads(threads)
