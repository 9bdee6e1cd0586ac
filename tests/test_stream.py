"""The stream's invariants: parity with one process, order, one teacher, overlap bookkeeping, bounded memory."""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from ray.data import DataContext, DataIterator
from ray.data.exceptions import ExecutionTimeoutError
from sources import CLUSTER, class_source, mlm_source, streamed

from raydistil import pace, teacher, wire
from raydistil.config.cluster import ClusterConfig
from raydistil.config.loss import LossConfig
from raydistil.config.targets import TargetsConfig
from raydistil.models import load_model, on_device
from raydistil.source import MicroBatches
from raydistil.specs import TargetsSpec, TeacherSpec
from raydistil.steps import FILLER, Steps
from raydistil.stream import build_stream, configure_data, execution_options
from raydistil.targets import decode_targets

LAST_STATE = TargetsSpec(TargetsConfig(), LossConfig(), (4,), False, 3)
ALL_STATES = TargetsSpec(TargetsConfig(), LossConfig(), (0, 1, 2, 3, 4), False, 3)


def test_every_micro_batch_once_in_order_by_one_teacher(ray_cluster: None, tiny_teacher: str, tmp_path: Path) -> None:
    source = mlm_source(tmp_path, tiny_teacher, epochs=3)
    rows = streamed(source, (TeacherSpec(tiny_teacher, "mlm", "float32", 1, LAST_STATE),))
    assert [row["index"][0].as_py() for row in rows] == list(range(source.manifest.num_micro_batches))
    assert source.manifest.num_micro_batches > source.manifest.per_epoch
    assert len({row["teacher_0"][0].as_py() for row in rows}) == 1


def test_consumed_micro_batches_do_not_come_again(ray_cluster: None, tiny_teacher: str, tmp_path: Path) -> None:
    source = mlm_source(tmp_path, tiny_teacher)
    rows = streamed(source, (), first=5)
    assert [row["index"][0].as_py() for row in rows] == list(range(5, source.manifest.num_micro_batches))


@pytest.mark.parametrize("per_step", [3, 4])
def test_every_worker_is_dealt_its_own(ray_cluster: None, tiny_teacher: str, tmp_path: Path, per_step: int) -> None:
    """By a teacher of two lanes, to three workers of which one is slow; they cannot share four evenly."""
    source = mlm_source(tmp_path, tiny_teacher)
    steps = Steps(per_step, 2, source.manifest.num_micro_batches // per_step, workers=3)
    dataset = build_stream(source, steps, (TeacherSpec(tiny_teacher, "mlm", "float32", 2, LAST_STATE),), CLUSTER)
    dataset.context.execution_options = execution_options(CLUSTER)

    def given(worker: int, share: DataIterator) -> list[int]:
        found = []
        for row in share.iter_batches(batch_size=1, batch_format="pyarrow"):
            time.sleep(0.02 * worker)
            found.append(row["index"][0].as_py())
        return found

    with ThreadPoolExecutor(3) as pool:
        dealt = list(pool.map(given, range(3), dataset.streaming_split(3, equal=True)))
    assert dealt == [steps.given(worker, np.arange(steps.num_rows // 3)).tolist() for worker in range(3)]
    assert sorted(n for part in dealt for n in part if n != FILLER) == list(range(2 * per_step, steps.last * per_step))


def test_class_targets_are_the_teachers_own(ray_cluster: None, tiny_classifier: str, tmp_path: Path) -> None:
    source = class_source(tmp_path, tiny_classifier)
    targets = TargetsSpec(TargetsConfig(), LossConfig(), (), True, 3)
    rows = streamed(source, (TeacherSpec(tiny_classifier, "classification", "float32", 1, targets),))
    widths = {row["width"][0].as_py() for row in rows}
    assert len(widths) > 1
    model = load_model(tiny_classifier, "classification").eval()
    for row in rows[:5]:
        batch = wire.batch_of(row)
        given = decode_targets(targets, wire.targets_of(row)[0], batch.num_tokens, torch.device("cpu"))
        ids_BL, mask_BL, *_ = on_device(batch, torch.device("cpu"))
        with torch.inference_mode():
            expected = model(input_ids=ids_BL, attention_mask=mask_BL).logits
        torch.testing.assert_close(given.soft_labels, expected.half())
        assert given.states == {}


@pytest.mark.slow
def test_a_slow_student_bounds_what_the_teacher_makes(ray_cluster: None, tiny_teacher: str, tmp_path: Path) -> None:
    source = mlm_source(tmp_path, tiny_teacher, rows=600, epochs=4)
    bound = 1 << 20
    cluster = ClusterConfig(max_bytes_in_flight=bound)
    spec = TeacherSpec(tiny_teacher, "mlm", "float32", 1, ALL_STATES)
    total = source.manifest.num_micro_batches
    dataset = build_stream(source, Steps(1, 0, total), (spec,), cluster)
    dataset.context.execution_options = execution_options(cluster)
    rows = iter(dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=1))
    first = next(rows)
    time.sleep(4)  # the student works on its first micro-batch
    resumed = time.time()
    ahead = [row for row in (next(rows) for _ in range(total - 1)) if row["ended_s_0"][0].as_py() < resumed]
    assert 0 < sum(row.nbytes for row in ahead) < 8 * bound < total * first.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [False, True])
def test_a_student_may_stand_still_for_as_long_as_it_likes(
    ray_cluster: None, tiny_teacher: str, tmp_path: Path, guarded: bool
) -> None:
    """Ray Data gives up what makes no progress for half an hour. `guarded`: for a second, which a stall is beyond."""
    source = mlm_source(tmp_path, tiny_teacher, rows=600, epochs=4)
    cluster = ClusterConfig(max_bytes_in_flight=1 << 20)
    spec = TeacherSpec(tiny_teacher, "mlm", "float32", 1, ALL_STATES)
    total = source.manifest.num_micro_batches
    dataset = build_stream(source, Steps(1, 0, total), (spec,), cluster)
    dataset.context.execution_options = execution_options(cluster)
    if guarded:
        dataset.context.execution_no_progress_timeout_s = 1.0
    rows = iter(dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=1))
    next(rows)
    time.sleep(6)
    if guarded:
        with pytest.raises(ExecutionTimeoutError):
            list(rows)
    else:
        assert len(list(rows)) == total - 1


def test_the_scheduler_takes_one_step_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: three steps at once, then one after longer than a step."""
    now, slept = 100.0, list[float]()

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        slept.append(seconds)

    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    paced = pace.Paced()
    for _ in range(3):
        paced.on_execution_step(None)
    now += 2 * pace.STEP_S
    paced.on_execution_step(None)
    assert slept == pytest.approx([0, pace.STEP_S, pace.STEP_S, 0])


def test_ray_data_is_quiet_whenever_it_was_imported() -> None:
    log = logging.getLogger("ray.data")
    log.setLevel(logging.INFO)  # as its import does
    configure_data()
    assert not log.isEnabledFor(logging.WARNING) and log.isEnabledFor(logging.ERROR)


def test_every_execution_is_paced(ray_cluster: None) -> None:
    configure_data()
    assert pace.Paced in DataContext.get_current().execution_callback_classes


@pytest.mark.parametrize("missing", [0, 1])
def test_past_the_end_micro_batches_hold_nothing(tiny_teacher: str, tmp_path: Path, missing: int) -> None:
    source = mlm_source(tmp_path, tiny_teacher)
    batch = MicroBatches(source).make(source.manifest.num_micro_batches + missing)
    assert batch.num_rows == 0


def test_a_fast_teacher_s_micro_batches_leave_it_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows take 20 ms each on a clock of its own, but for one that takes longer than a group."""
    now = 100.0

    def rows() -> Iterator[pa.Table]:
        nonlocal now
        for number, seconds in enumerate((0.02, 0.02, 0.02, 0.3, 0.02)):
            now += seconds
            yield pa.table({"n": [number]})

    monkeypatch.setattr(teacher, "time", SimpleNamespace(monotonic=lambda: now))
    assert [table["n"].to_pylist() for table in teacher.grouped(rows())] == [[0, 1, 2], [3], [4]]
    assert list(teacher.grouped([])) == []
