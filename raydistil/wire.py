"""The form of a micro-batch in the object store: one row of one Arrow table.

Arrays travel as raw bytes, so that every block has the same column types whatever the bucket's length, and reading one
is a view, not a copy. Empty bytes mean "not there".
"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raydistil.types import TeacherTiming, TokenBatch

BATCH = pa.schema([
    ("index", pa.int64()),
    ("num_rows", pa.int32()),  # rows that count; the rest are padding
    ("width", pa.int32()),  # padded length L
    ("ids", pa.binary()),  # int32 [B, L]
    ("lengths", pa.binary()),  # int32 [B]
    ("labels", pa.binary()),  # int32 [B], classification
    ("token_labels", pa.binary()),  # int32 [B, L], masked-LM and causal LM
    ("visits", pa.binary()),  # int64 [B]
    ("positions", pa.binary()),  # int32 [B, L], causal LM
])  # fmt: skip
TARGETS = pa.schema([
    *BATCH,
    ("states", pa.large_binary()),  # see targets
    ("soft_labels", pa.large_binary()),
    ("teacher", pa.string()),
    ("started_s", pa.float64()),
    ("ended_s", pa.float64()),
])  # fmt: skip


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
        "labels": b"" if batch.labels_B is None else batch.labels_B.tobytes(),
        "token_labels": b"" if batch.labels_BL is None else batch.labels_BL.tobytes(),
        "visits": batch.visits_B.tobytes(),
        "positions": b"" if batch.positions_BL is None else batch.positions_BL.tobytes(),
    }


def batch_of(row: pa.Table) -> TokenBatch:
    """The micro-batch of a one-row table with at least the columns of BATCH."""
    width = row["width"][0].as_py()
    labels, token_labels, positions = (_ints(row, name) for name in ("labels", "token_labels", "positions"))
    return TokenBatch(
        index=row["index"][0].as_py(),
        input_ids_BL=_ints(row, "ids").reshape(-1, width),
        lengths_B=_ints(row, "lengths"),
        labels_B=labels if labels.size else None,
        labels_BL=token_labels.reshape(-1, width) if token_labels.size else None,
        num_rows=row["num_rows"][0].as_py(),
        visits_B=np.frombuffer(_bytes(row, "visits"), np.int64),
        positions_BL=positions.reshape(-1, width) if positions.size else None,
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
    """`row` with what the teacher made of it, columns of TARGETS. `timing` None: not now, but before the run."""
    timing = timing or TeacherTiming("", 0.0, 0.0, 0)
    added = {**columns, "teacher": timing.actor, "started_s": timing.started_s, "ended_s": timing.ended_s}
    arrays = [pa.array([added[name]], TARGETS.field(name).type) for name in TARGETS.names[len(BATCH.names) :]]
    return pa.Table.from_arrays([*row.columns, *arrays], schema=TARGETS)


def targets_of(row: pa.Table) -> dict[str, Any] | None:
    """The columns of `targets` as buffers, or None where no teacher was asked."""
    if "states" not in row.column_names:
        return None
    return {name: _bytes(row, name) for name in ("states", "soft_labels")}


def timing_of(row: pa.Table, tokens: int) -> TeacherTiming | None:
    """When the teacher worked on this micro-batch, or None where none did in this run."""
    actor = row["teacher"][0].as_py() if "teacher" in row.column_names else ""
    if not actor:
        return None
    return TeacherTiming(actor, row["started_s"][0].as_py(), row["ended_s"][0].as_py(), tokens)
