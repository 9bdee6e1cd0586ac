"""The trace of a training: one line a micro-batch, what it was and when it was taught and trained on.

Written by each student worker as it goes, where `cluster.trace` asks for it, and handed to the system before the next
micro-batch: what stands in it did happen, whatever killed the worker afterwards.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from raydistil.types import TeacherTiming


@dataclass(frozen=True, slots=True)
class Record:
    """One micro-batch on one student worker. Times are seconds of the wall clock."""

    step: int  # the optimizer step it is part of, from 1
    index: int  # its place in the manifest
    num_rows: int  # that count
    tokens: int  # real ones
    num_bytes: int  # of everything that crossed the wire for it
    asked_s: float  # the worker was ready for it
    started_s: float  # it was there
    ended_s: float  # forward, backward and, where it was the step's last, the optimizer are done
    taught: tuple[TeacherTiming, ...]  # none where its targets were kept before, or it has none
    began_s: float = 0.0  # when its workers started, the same for all of them
    from_step: int = 0  # steps that their weights had behind them then, as DeepSpeed has counted


class Trace:
    """The file of one worker; `path` None: nothing is written."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def add(self, record: Record) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf8") as file:
                file.write(json.dumps(asdict(record)) + "\n")


def trace_path(run_dir: Path, stage: str, rank: int) -> Path:
    return run_dir / f"{stage}-trace-{rank}.jsonl"


def history(records: list[Record]) -> list[Record]:
    """What the last checkpoint stands on: of every start what it did before the one that went on instead of it."""
    starts = {(record.began_s, record.from_step) for record in records}
    return [
        record for record in records
        if not any(began > record.began_s and record.step > step for began, step in starts)
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Audit:
    """Of the micro-batches of a training: what the trace says became of them."""

    expected: int
    trained: int
    lost: list[int]  # never trained on
    duplicated: list[int]  # more than once
    repeated: int  # trained on once more, since a kill undid them


def audit(records: list[Record], expected: int) -> Audit:
    """Whether the history that the last checkpoint stands on has each of `expected` micro-batches once."""
    stand = Counter(record.index for record in history(records) if record.num_rows)
    lost = sorted(set(range(expected)) - set(stand))
    undone = sum(record.num_rows > 0 for record in records) - stand.total()
    return Audit(expected, stand.total(), lost, sorted(index for index, times in stand.items() if times > 1), undone)


def read_trace(run_dir: Path, stage: str) -> list[Record]:
    """The records of all workers of a stage in the order of their ends. A line cut short by a kill is left out."""
    paths = sorted(run_dir.glob(f"{stage}-trace-*.jsonl"))
    return sorted((record for path in paths for record in _records(path)), key=lambda record: record.ended_s)


def _records(path: Path) -> Iterator[Record]:
    for line in path.read_text(encoding="utf8").splitlines(keepends=True):
        if line.endswith("\n"):
            fields = json.loads(line)
            taught = tuple(TeacherTiming(**timing) for timing in fields.pop("taught"))
            yield Record(**fields, taught=taught)
