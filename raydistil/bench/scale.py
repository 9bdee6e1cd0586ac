"""bench scale: how far the stream carries.

(a) Real: the stream on several Ray nodes of this machine, with teachers and a student that sleep instead of reckoning,
so that two cores are enough for as many of them as one likes. Blocks of targets are as large as real ones and take the
way of real ones. The rate should be that of the teachers together, until the student's own binds.

(b) On paper: each part of a cluster as a server with the cost a micro-batch has there, measured here or given. The
part with the least capacity binds; the others wait for it (see `paper`).
"""

import json
import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from transformers import BertConfig, BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

from raydistil.bench import MINILM
from raydistil.bench.nodes import PART, head_node
from raydistil.bench.paper import Costs, Machines, outlook
from raydistil.bench.stream import LENGTH
from raydistil.bench.window import Window, window_of
from raydistil.config import config_of
from raydistil.config.cluster import ClusterConfig
from raydistil.manifest import Manifest
from raydistil.models import num_parameters
from raydistil.payload import count_payload, payload_path
from raydistil.prepare import Say, make_store
from raydistil.size import forward_flops
from raydistil.specs import SourceSpec
from raydistil.steps import Steps
from raydistil.stream import PREFETCH, build_source, execution_options, on_teachers
from raydistil.teacher import grouped
from raydistil.tokens import TokenStore
from raydistil.trace import Record
from raydistil.types import TeacherTiming
from raydistil.wire import batch_of, timings_of, with_targets

Tree = dict[str, Any]
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
MASKED = 0.15  # share of the tokens at which the vocabulary heads are applied
MICRO_BATCH = 16
BLOCK_BYTES = MICRO_BATCH * LENGTH * 384 * 2  # the targets of a micro-batch of MiniLM
TOKENS = 32 * 512  # of a GPU's micro-batch
AHEAD = 16
BATCH_BYTES = 8  # a token: its id and its label
NODES = 3  # besides the head
NODE_STORE_BYTES = 512 << 20
WARM_UP = 0.5  # of a window's time, before it


@dataclass(frozen=True, slots=True)
class Timers:
    """How long teacher and student sleep over a micro-batch, and how large its targets are."""

    teacher_s: float
    student_s: float
    num_bytes: int
    window_s: float  # how long the stream is watched


class SleepingTeacher:
    """In the place of `Teacher`: sleeps, and says so many random bytes."""

    def __init__(self, spec: Timers) -> None:
        self._spec = spec
        node = ray.get_runtime_context().get_node_labels()[PART]
        self._name = f"{node}/{ray.get_runtime_context().get_node_id()}/{time.time_ns()}"
        self._states = np.random.default_rng(0).bytes(spec.num_bytes)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        return grouped(self._taught(table.slice(number, 1)) for number in range(table.num_rows))

    def _taught(self, row: pa.Table) -> pa.Table:
        started = time.time()
        time.sleep(self._spec.teacher_s)
        timing = TeacherTiming(self._name, started, time.time(), batch_of(row).num_tokens)
        return with_targets(row, {"states": self._states, "soft_labels": b""}, timing)


@ray.remote(num_cpus=1, label_selector={PART: "student"})
class SleepingStudent:
    """In the place of `StudentWorker`: takes its shard and sleeps over every micro-batch."""

    def consume(self, shard: Any, seconds: float) -> list[Record]:
        rows = iter(shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=PREFETCH))
        return list(self._records(rows, seconds))

    def _records(self, rows: Iterator[pa.Table], seconds: float) -> Iterator[Record]:
        asked = time.time()
        for step, row in enumerate(rows, start=1):
            started, batch = time.time(), batch_of(row)
            time.sleep(seconds)
            ended, tokens = time.time(), batch.num_tokens
            yield Record(
                step, batch.index, batch.num_rows, tokens, row.nbytes, asked, started, ended,
                tuple(timings_of(row, tokens)),
            )  # fmt: skip
            asked = ended


@dataclass(frozen=True, slots=True)
class Assumed:
    """Of a GPU and its model: what cannot be measured here, and is given."""

    gpu_flops_s: float  # of its matrix products
    used: float  # share of them that a model reaches
    tokens: int  # of a micro-batch
    ahead: int  # micro-batches on the way for every student


def bench_scale(
    output: Path, timers: Timers, counts: tuple[int, ...], assumed: Assumed, machines: Machines, say: Say
) -> Tree:  # fmt: skip
    """Both parts, see the module."""
    output.mkdir(parents=True, exist_ok=True)
    source = source_of(output)
    rows = []
    with several_nodes(max(counts)):
        store_bytes_s = store_rate(timers.num_bytes)
        for pool in (*((count, count) for count in counts), (1, max(counts))):  # the last one grows by itself
            rows.append(_row(pool, timers, *_measured(output, source, timers, pool)))
            say(f"{pool[0]} to {pool[1]} teachers: {rows[-1]['micro_batches_s']:.1f} micro-batches a second")
    scheduler_s = min(row["scheduler_s"] for row in rows)  # under most load: with little, it mostly looks for work
    costs = costs_of(assumed, scheduler_s)
    machines = replace(machines, store_bytes_s=store_bytes_s)
    return {
        "nodes": NODES + 1, "timers": asdict(timers), "rows": rows, "scheduler_s": scheduler_s,
        "store_bytes_s": store_bytes_s, "driver_payload_bytes": max(row["payload_bytes"] for row in rows),
        "assumed": asdict(assumed) | asdict(machines), "costs": asdict(costs),
        "paper": [asdict(outlook(gpus, costs, machines, assumed.ahead)) for gpus in GPUS],
    }  # fmt: skip


def source_of(output: Path) -> SourceSpec:
    """Real micro-batches, of one epoch: packed docstrings with masks."""
    config = config_of({
        "output_dir": str(output), "task": "mlm", "teacher": {"model": MINILM}, "student": {"layers": [0, 2, 4]},
        "corpus": {"source": "python-docs", "max_rows": 400, "validation_share": 0.0, "test_share": 0.0},
    })  # fmt: skip
    store = TokenStore(make_store(config))
    manifest = Manifest(store.bucket_rows("train"), 1, MICRO_BATCH, config.seed)
    return SourceSpec(store.path, "train", manifest, config.masking)


def costs_of(assumed: Assumed, scheduler_s: float) -> Costs:
    """Of BERT-base -> DistilBERT in rows of LENGTH, masked LM, hidden states in fp16."""
    with torch.device("meta"):
        teacher, student = BertForMaskedLM(BertConfig()), DistilBertForMaskedLM(DistilBertConfig())
    rate, width = assumed.gpu_flops_s * assumed.used, teacher.config.hidden_size
    forward = [forward_flops(model, LENGTH, MASKED) for model in (teacher, student)]
    return Costs(
        tokens=assumed.tokens, teacher_s=assumed.tokens * forward[0] / rate,
        student_s=3 * assumed.tokens * forward[1] / rate, scheduler_s=scheduler_s,
        num_bytes=assumed.tokens * (2 * width + BATCH_BYTES), parameters=num_parameters(student),
    )  # fmt: skip


def store_rate(num_bytes: int) -> float:
    """Bytes a second that one process writes to the object store and reads again, each byte counted twice."""
    block, spent = np.random.default_rng(0).bytes(num_bytes), []
    for _ in range(20):
        started = time.perf_counter()
        read = ray.get(ray.put(np.frombuffer(block, np.uint8)))
        read.copy()
        spent.append(time.perf_counter() - started)
    return 2 * num_bytes / statistics.median(spent)


@contextmanager
def several_nodes(teachers: int) -> Iterator[None]:
    """Connected to a cluster of raylets on this machine, with logical CPUs for so many teachers and what else runs."""
    with head_node(NODE_STORE_BYTES, {PART: "student"}) as cluster:
        for _ in range(NODES):
            cluster.add_node(
                num_cpus=-(-teachers // NODES), object_store_memory=NODE_STORE_BYTES, labels={PART: "teacher"}
            )
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            yield
        finally:
            ray.shutdown()


def _measured(output: Path, source: SourceSpec, timers: Timers, pool: tuple[int, int]) -> tuple[Window, Tree]:
    """The window of a stream with (fewest, most) teachers, and what was counted where it is scheduled."""
    rate = _expected(timers, pool[1])
    warm_up = max(1, round(rate * WARM_UP * timers.window_s))
    total = warm_up + round(rate * timers.window_s)
    manifest = replace(source.manifest, epochs=-(-total // source.manifest.per_epoch))
    spec = replace(source, manifest=manifest)
    config = ClusterConfig(teachers=pool, teacher_label_selector={PART: "teacher"})
    dataset = on_teachers(build_source(spec, Steps(1, 0, total)), SleepingTeacher, (timers,), config)
    dataset.context.execution_options = execution_options(config)
    name = f"{pool[0]}-{pool[1]}-teachers"
    kept = payload_path(output.resolve(), name, "scheduler")
    kept.unlink(missing_ok=True)  # of a benchmark before
    count_payload(dataset, output.resolve(), name)
    (shard,) = dataset.streaming_split(1)
    student: Any = SleepingStudent.remote()  # type: ignore[attr-defined]
    records = ray.get(student.consume.remote(shard, timers.student_s))
    ray.kill(student)
    counts = json.loads(kept.read_text())
    actors = {tuple(timing.lane.split("/")) for record in records for timing in record.taught}
    assert {part for part, *_ in actors} == {"teacher"}, "teachers run where their labels say"
    places = {node for _, node, _ in actors}
    return window_of(records, warm_up), counts | {"rows": len(records), "nodes": len(places), "used": len(actors)}


def _expected(timers: Timers, teachers: int) -> float:
    """Micro-batches a second: the teachers' together, or the student's where that is less."""
    return min(teachers / timers.teacher_s, 1 / timers.student_s)


def _row(pool: tuple[int, int], timers: Timers, window: Window, counts: Tree) -> Tree:
    made, teachers = window.micro_batches / window.seconds, pool[1]
    return {
        "fewest": pool[0], "teachers": teachers, "teachers_used": counts["used"],
        "micro_batches_s": made, "expected": _expected(timers, teachers),
        "share": made / _expected(timers, teachers), "binds": _binds(timers, teachers),
        "wait_fraction": window.wait_s / window.seconds, "bytes_s": window.num_bytes / window.seconds,
        "scheduler_s": counts["cpu_s"] / counts["rows"], "payload_bytes": counts["num_bytes"],
        "teacher_nodes": counts["nodes"],
    }  # fmt: skip


def _binds(timers: Timers, teachers: int) -> str:
    return "teacher" if teachers / timers.teacher_s < 1 / timers.student_s else "student"
