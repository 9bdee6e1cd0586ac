"""The form of a micro-batch in the object store: one row of one Arrow table.

Arrays travel as raw bytes, so that every block has the same column types whatever the bucket's length, and reading one
is a view, not a copy. Empty bytes mean "not there".
"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raydistil.types import Labels, TeacherTiming, TokenBatch

BATCH = pa.schema([
    ("index", pa.int64()),
    ("num_rows", pa.int32()),  # rows that count; the rest are padding
    ("width", pa.int32()),  # padded length L
    ("ids", pa.binary()),  # int32 [B, L]
    ("lengths", pa.binary()),  # int32 [B]
    ("labels", pa.binary()),  # int32 [B], classification
    ("numbers", pa.binary()),  # float32 [B], regression
    ("token_labels", pa.binary()),  # int32 [B, L], masked-LM and causal LM
    ("visits", pa.binary()),  # int64 [B]
    ("positions", pa.binary()),  # int32 [B, L], causal LM
    ("tags", pa.binary()),  # int32 [B, L], token classification
    ("spans", pa.binary()),  # int32 [B, 2], question answering
    ("contexts", pa.binary()),  # int32 [B], question answering
])  # fmt: skip
TARGETS = {  # a set for each teacher, its number behind the name
    "states": pa.large_binary(),  # see targets
    "soft_labels": pa.large_binary(),
    "teacher": pa.string(),
    "started_s": pa.float64(),
    "ended_s": pa.float64(),
}


def schema_of(num_teachers: int) -> pa.Schema:
    """Columns of a micro-batch with the targets of so many teachers."""
    return pa.schema([*BATCH, *(field for number in range(num_teachers) for field in _fields(number))])


def _fields(number: int) -> list[pa.Field]:
    return [pa.field(f"{name}_{number}", kind) for name, kind in TARGETS.items()]


def table_of(batches: list[TokenBatch]) -> pa.Table:
    """One row a micro-batch, columns of BATCH."""
    return pa.Table.from_pylist([_row(batch) for batch in batches], schema=BATCH)


def _row(batch: TokenBatch) -> dict[str, Any]:
    return {
        "index": batch.index,
        "num_rows": batch.num_rows,
        "width": batch.input_ids_BL.shape[1],
        "ids": batch.input_ids_BL.tobytes(),
        "lengths": batch.lengths_B.tobytes(),
        "labels": _kind(batch.labels_B, np.int32),
        "numbers": _kind(batch.labels_B, np.float32),
        "token_labels": _if_there(batch.labels_BL),
        "visits": batch.visits_B.tobytes(),
        "positions": _if_there(batch.positions_BL),
        "tags": _if_there(batch.tags_BL),
        "spans": _if_there(batch.spans_B2),
        "contexts": _if_there(batch.contexts_B),
    }


def _if_there(values: NDArray[np.int32] | None) -> bytes:
    return b"" if values is None else values.tobytes()


def _kind(labels_B: Labels | None, dtype: type[np.generic]) -> bytes:
    """The labels if they are of that kind."""
    return labels_B.tobytes() if labels_B is not None and labels_B.dtype == dtype else b""


def batch_of(row: pa.Table) -> TokenBatch:
    """The micro-batch of a one-row table with at least the columns of BATCH."""
    width = row["width"][0].as_py()
    names = ("labels", "token_labels", "positions", "tags", "spans", "contexts")
    classes, token_labels, positions, tags, spans, contexts = (_ints(row, name) for name in names)
    labels: Labels = classes if classes.size else np.frombuffer(_bytes(row, "numbers"), np.float32)
    return TokenBatch(
        index=row["index"][0].as_py(),
        input_ids_BL=_ints(row, "ids").reshape(-1, width),
        lengths_B=_ints(row, "lengths"),
        labels_B=labels if labels.size else None,
        labels_BL=token_labels.reshape(-1, width) if token_labels.size else None,
        num_rows=row["num_rows"][0].as_py(),
        visits_B=np.frombuffer(_bytes(row, "visits"), np.int64),
        positions_BL=positions.reshape(-1, width) if positions.size else None,
        tags_BL=tags.reshape(-1, width) if tags.size else None,
        spans_B2=spans.reshape(-1, 2) if spans.size else None,
        contexts_B=contexts if contexts.size else None,
    )


def _ints(row: pa.Table, name: str) -> NDArray[np.int32]:
    return np.frombuffer(_bytes(row, name), np.int32)


def _bytes(row: pa.Table, name: str) -> pa.Buffer:
    """A view of the one value of a binary column; a pyarrow scalar would hold a copy."""
    (chunk,) = (chunk for chunk in row[name].chunks if len(chunk))
    _, offsets, data = chunk.buffers()
    width = np.int64 if pa.types.is_large_binary(chunk.type) else np.int32
    start, end = np.frombuffer(offsets, width)[chunk.offset : chunk.offset + 2]
    return pa.py_buffer(b"") if start == end else data.slice(start, end - start)


def with_targets(row: pa.Table, columns: dict[str, bytes], timing: TeacherTiming | None) -> pa.Table:
    """`row` with what the next teacher made of it. `timing` None: not now, but before the run."""
    timing = timing or TeacherTiming("", 0.0, 0.0, 0)
    added = {**columns, "teacher": timing.lane, "started_s": timing.started_s, "ended_s": timing.ended_s}
    arrays = [pa.array([added[name]], kind) for name, kind in TARGETS.items()]
    fields = _fields(num_teachers(row))
    return pa.Table.from_arrays([*row.columns, *arrays], schema=pa.schema([*row.schema, *fields]))


def num_teachers(row: pa.Table) -> int:
    """How many have spoken."""
    return len(row.column_names[len(BATCH) :]) // len(TARGETS)


def targets_of(row: pa.Table) -> list[dict[str, Any]]:
    """The columns of `targets` as buffers, a set for each teacher."""
    return [
        {name: _bytes(row, f"{name}_{number}") for name in ("states", "soft_labels")}
        for number in range(num_teachers(row))
    ]


def timings_of(row: pa.Table, tokens: int) -> list[TeacherTiming]:
    """When teachers worked on this micro-batch; of those that did in this run."""
    found = []
    for number in range(num_teachers(row)):
        lane, started, ended = (row[f"{name}_{number}"][0].as_py() for name in ("teacher", "started_s", "ended_s"))
        found += [TeacherTiming(lane, started, ended, tokens)] if lane else []
    return found
