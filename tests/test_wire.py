"""A micro-batch as one row of one Arrow table, there and back."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from raydistil import wire
from raydistil.types import IGNORE, TeacherTiming, TokenBatch

TIMING = TeacherTiming("actor-1", 10.5, 11.25, 0)


@st.composite
def batches(draw: st.DrawFn) -> TokenBatch:
    """Micro-batches of any width, with classes or numbers, masked or of documents, with padding rows or not."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    masked = draw(st.booleans())
    labels_BL = np.where(rng.random((rows, width)) < 0.2, rng.integers(0, 99, (rows, width)), IGNORE).astype(np.int32)
    labels_B = rng.integers(0, 99, rows).astype(draw(st.sampled_from([np.int32, np.float32])))
    return TokenBatch(
        index=draw(st.integers(0, 2**62)),
        input_ids_BL=rng.integers(0, 2**31 - 1, (rows, width)).astype(np.int32),
        lengths_B=rng.integers(1, width + 1, rows).astype(np.int32),
        labels_B=None if masked else labels_B,
        labels_BL=labels_BL if masked else None,
        num_rows=draw(st.integers(0, rows)),
        visits_B=rng.integers(0, 2**62, rows),
        positions_BL=rng.integers(0, width, (rows, width)).astype(np.int32) if masked and draw(st.booleans()) else None,
    )


def same(first: TokenBatch, second: TokenBatch) -> bool:
    return all(
        np.array_equal(getattr(first, name), getattr(second, name))
        if isinstance(getattr(first, name), np.ndarray)
        else getattr(first, name) == getattr(second, name)
        for name in TokenBatch.__slots__
    )


@given(st.lists(batches(), min_size=1, max_size=4))
def test_batches_come_back_as_they_were(made: list[TokenBatch]) -> None:
    table = wire.table_of(made)
    assert table.num_rows == len(made)
    for number, batch in enumerate(made):
        back = wire.batch_of(table.slice(number, 1))
        assert same(back, batch)
        assert back.input_ids_BL.dtype == back.lengths_B.dtype == np.int32
        assert (back.labels_B is None) or (batch.labels_B is not None and back.labels_B.dtype == batch.labels_B.dtype)
        assert back.num_tokens == int(batch.lengths_B.sum())


@given(st.lists(batches(), max_size=4))
def test_every_table_has_the_one_schema(made: list[TokenBatch]) -> None:
    assert wire.table_of(made).schema == wire.BATCH


@given(batches(), st.binary(min_size=1, max_size=50), st.binary(max_size=50))
def test_targets_come_back_as_they_were(batch: TokenBatch, states: bytes, soft_labels: bytes) -> None:
    table = wire.with_targets(wire.table_of([batch]), {"states": states, "soft_labels": soft_labels}, TIMING)
    assert table.schema == wire.schema_of(1)
    assert same(wire.batch_of(table), batch)
    (targets,) = wire.targets_of(table)
    assert targets is not None
    assert {name: buffer.to_pybytes() for name, buffer in targets.items()} == {
        "states": states,
        "soft_labels": soft_labels,
    }
    assert wire.timings_of(table, 7) == [TeacherTiming("actor-1", 10.5, 11.25, 7)]


@given(st.lists(batches(), min_size=2, max_size=4))
def test_tables_of_any_widths_can_be_joined(made: list[TokenBatch]) -> None:
    """Ray Data joins and cuts blocks as it likes."""
    columns = {"states": b"h", "soft_labels": b""}
    whole = pa.concat_tables(wire.with_targets(wire.table_of([batch]), columns, TIMING) for batch in made)
    for table in (whole, whole.combine_chunks()):
        assert all(same(wire.batch_of(table.slice(n, 1)), batch) for n, batch in enumerate(made))


def test_without_a_teacher_there_is_neither_target_nor_timing() -> None:
    ids = np.ones((1, 2), np.int32)
    row = wire.table_of([TokenBatch(0, ids, np.array([2], np.int32), np.array([0], np.int32), None, 1, np.arange(1))])
    assert wire.targets_of(row) == []
    assert wire.timings_of(row, 2) == []


def test_reading_is_a_view_and_not_a_copy() -> None:
    lengths, labels = np.array([3, 3], np.int32), np.array([0, 1], np.int32)
    made = [TokenBatch(n, np.full((2, 3), n, np.int32), lengths, labels, None, 2, np.arange(2)) for n in range(3)]
    table = wire.table_of(made)
    memory = table["ids"].chunk(0).buffers()[2]
    for number in range(3):
        ids = wire.batch_of(table.slice(number, 1)).input_ids_BL
        assert ids.ctypes.data == memory.address + number * ids.nbytes
