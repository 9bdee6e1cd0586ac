"""A teacher's targets as Arrow columns, one row a text, and back to the bytes of the wire.

Plain Arrow types throughout, so any tool that reads Parquet reads them. T tokens of a row (padding is left out), N of
its places with soft labels (what other heads than a vocabulary's say: see `heads`), D hidden size, C classes or
vocabulary, K entries kept; one row of the table:

| column          | type                                    | holds                                                 |
|-----------------|-----------------------------------------|-------------------------------------------------------|
| `row`           | int64                                   | number of the row in its bucket of the token store    |
| `input_ids`     | list<int32> [T]                         | what the teacher saw, masks and all                   |
| `state_n`       | list<fixed_size_list<float16>> [T, D]   | state n (0: the embeddings), with `states = "fp16"`   |
|                 | list<fixed_size_list<float>> [T, D]     | the same with `"bf16"`: exact, its zeros cost little  |
|                 | list<fixed_size_list<uint8>> [T, D]     | the same with `"int8"`: less 128, times its scale     |
| `state_n_scale` | list<float> [T]                         | with `"int8"`                                         |
| `places`        | list<int32> [N]                         | which tokens, of a vocabulary's soft labels           |
| `logits`        | list<fixed_size_list<float16>> [N, C]   | codec `logits`, and other heads with `hidden`         |
|                 | list<fixed_size_list<float>> [N, 1]     | a number with `logits` or `hidden` (N = 1)            |
| `top_ids`       | list<fixed_size_list<ids>> [N, K]       | codec `topk`: the most probable                       |
| `top_log_probs` | list<fixed_size_list<float16>> [N, K+1] | their log-probabilities and, last, that of all others |
| `drawn_ids`     | list<list<ids>> [N, distinct ones]      | codec `sampled`                                       |
| `drawn_counts`  | list<list<counts>> [N, distinct ones]   | how often each was drawn                              |

ids: uint16, or int32 where C > 65,536; counts: uint8, or uint16 beyond 255 draws. Probabilities are at the temperature
of the loss. The file's metadata holds, under `raydistil`, a JSON object with the fingerprint, the file's name in
the cache and C.

What is written is what crossed the wire, number for number: nothing is rounded twice.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raydistil.codecs.layout import HEADER_BYTES, LOGITS, MANY, SAMPLED, TOPK, WIDE, joined, parted
from raydistil.manifest import Ints
from raydistil.places import compared_places, said_of_rows
from raydistil.specs import TargetsSpec
from raydistil.types import TokenBatch

Bytes = NDArray[np.uint8]

_SIGN = np.uint8(128)


def table_of(spec: TargetsSpec, batch: TokenBatch, rows: Ints, wire: Mapping[str, bytes]) -> tuple[pa.Table, int]:
    """(one row for each of the micro-batch's, C or 0) of the wire's columns; `rows`: their numbers in the bucket."""
    columns = {"row": pa.array(rows), "input_ids": _ragged(pa.array(_real_ids(batch)), batch.lengths_B)}
    columns |= dict(_states(spec, batch, np.frombuffer(wire["states"], np.uint8)))
    if not spec.soft_labels:
        return pa.table(columns), 0
    places_B = said_of_rows(batch)
    if batch.labels_BL is not None:
        places_B, places_N = _places(spec, batch)
        columns["places"] = _ragged(pa.array(places_N), places_B)
    parts = [np.frombuffer(part, np.uint8) for part in parted(wire["soft_labels"])]
    columns |= _soft_labels(parts, places_B)
    return pa.table(columns), _header(parts[0])[2] if parts else 0


def wire_of(spec: TargetsSpec, table: pa.Table, classes: int) -> dict[str, bytes]:
    """What the teacher would have sent of a micro-batch of the rows of `table`, one chunk a column."""
    states = b"".join(part for number in spec.states for part in _state_bytes(spec, table, number))
    return {"states": states, "soft_labels": _label_bytes(spec, table, classes) if spec.soft_labels else b""}


def real_ids(table: pa.Table) -> NDArray[np.generic]:
    """The tokens of all rows, one row after the other."""
    return _values(table, "input_ids", 1)


# ---- from the wire


def _real_ids(batch: TokenBatch) -> NDArray[np.int32]:
    real_BL = np.arange(batch.input_ids_BL.shape[1])[None, :] < batch.lengths_B[:, None]
    return batch.input_ids_BL[real_BL]


def _states(spec: TargetsSpec, batch: TokenBatch, whole: Bytes) -> Iterator[tuple[str, pa.Array]]:
    tokens, lengths_B = batch.num_tokens, batch.lengths_B
    for number, part in zip(spec.states, np.split(whole, max(1, len(spec.states))), strict=False):
        name = f"state_{number}"
        if spec.config.states == "int8":
            yield f"{name}_scale", _ragged(pa.array(part[: 4 * tokens].view(np.float32)), lengths_B)
            values = part[4 * tokens :] ^ _SIGN  # Parquet writes 32 bits: a sign would be 25 of them
        elif spec.config.states == "bf16":
            values = (part.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = part.view(np.float16)
        yield name, _ragged(_wide(values, len(values) // tokens), lengths_B)


def _places(spec: TargetsSpec, batch: TokenBatch) -> tuple[Ints, NDArray[np.int32]]:
    """(how many places each row has, which of its tokens they are)."""
    at_T = compared_places(batch, spec.loss, spec.seed).at_T
    rows_T = np.repeat(np.arange(len(batch.lengths_B)), batch.lengths_B)
    starts_B = np.cumsum(batch.lengths_B) - batch.lengths_B
    places_T = np.arange(len(at_T)) - starts_B[rows_T]
    return np.bincount(rows_T[at_T], minlength=len(starts_B)), places_T[at_T].astype(np.int32)


def _soft_labels(parts: list[Bytes], places_B: Ints) -> dict[str, pa.Array]:
    """Columns of all parts, whose places follow each other."""
    by_part = [_of_places(part) for part in parts]
    places = sum(len(next(iter(columns.values()))) for columns in by_part)
    assert places == places_B.sum(), f"expected soft labels of {places_B.sum()} places, got {places}"
    whole = {name: pa.concat_arrays([columns[name] for columns in by_part]) for name in by_part[0]}
    return {name: _ragged(values, places_B) for name, values in whole.items()}


def _of_places(labels: Bytes) -> dict[str, pa.Array]:
    """By place, what a part holds."""
    kind, places, classes, number = _header(labels)
    body = labels[HEADER_BYTES:]
    if kind == LOGITS:
        return {"logits": _wide(body.view(np.float32 if classes == 1 else np.float16), classes)}
    ids = _id_type(classes)
    if kind == TOPK:
        end = places * number * ids.itemsize
        logs = _wide(body[end : end + 2 * places * (number + 1)].view(np.float16), number + 1)
        return {"top_ids": _wide(body[:end].view(ids), number), "top_log_probs": logs}
    counts = _count_type(number)
    distinct_N = body[len(body) - places * counts.itemsize :].view(counts).astype(np.int64)
    split, end = (int(distinct_N.sum()) * size for size in (ids.itemsize, ids.itemsize + counts.itemsize))
    return {
        "drawn_ids": _ragged(pa.array(body[:split].view(ids)), distinct_N),
        "drawn_counts": _ragged(pa.array(body[split:end].view(counts)), distinct_N),
    }


def _header(labels: Bytes) -> tuple[int, int, int, int]:
    """(kind, N, C, and K or R)."""
    kind, places, classes, number = labels[:HEADER_BYTES].view(np.int32).tolist()
    return kind, places, classes, number


def _ragged(values: pa.Array, lengths: Ints | NDArray[np.int32]) -> pa.Array:
    """Lists of so many of the values, one after the other."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _wide(values: NDArray[np.generic], width: int) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values), width)


def _id_type(classes: int) -> np.dtype[np.generic]:
    return np.dtype(np.uint16 if classes <= WIDE else np.int32)


def _count_type(draws: int) -> np.dtype[np.generic]:
    return np.dtype(np.uint8 if draws <= MANY else np.uint16)


# ---- to the wire


def _values(table: pa.Table, name: str, depth: int) -> NDArray[np.generic]:
    """The numbers of a column of lists in lists, `depth` deep."""
    array = _lists(table, name, depth)
    values: NDArray[np.generic] = array.to_numpy(zero_copy_only=False)
    return values


def _lists(table: pa.Table, name: str, depth: int) -> pa.Array:
    """A column with its outer `depth` levels taken off."""
    (array,) = table[name].chunks
    for _ in range(depth):
        array = array.flatten()
    return array


def _state_bytes(spec: TargetsSpec, table: pa.Table, number: int) -> Iterator[bytes]:
    name = f"state_{number}"
    values = _values(table, name, 2)
    if spec.config.states == "int8":
        yield _values(table, f"{name}_scale", 1).tobytes()
        values = values.view(np.uint8) ^ _SIGN
    if spec.config.states == "bf16":
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    yield values.tobytes()


def _label_bytes(spec: TargetsSpec, table: pa.Table, classes: int) -> bytes:
    if spec.config.codec == "topk":
        kept = table["top_ids"].type.value_type.list_size
        ids, logs = _lists(table, "top_ids", 1), _values(table, "top_log_probs", 2)
        return _whole((TOPK, len(ids), classes, kept), _values(table, "top_ids", 2).tobytes(), logs.tobytes())
    if spec.config.codec == "sampled":
        draws = spec.config.num_draws
        distinct_N = _lists(table, "drawn_ids", 1).value_lengths().to_numpy()
        parts = (
            _values(table, "drawn_ids", 2), _values(table, "drawn_counts", 2),
            distinct_N.astype(_count_type(draws)),
        )  # fmt: skip
        return _whole((SAMPLED, len(distinct_N), classes, draws), *(part.tobytes() for part in parts))
    places = len(_lists(table, "logits", 1))
    return _whole((LOGITS, places, classes, 0), _values(table, "logits", 2).tobytes())


def _whole(header: tuple[int, int, int, int], *columns: bytes) -> bytes:
    """Soft labels in one part."""
    return joined([b"".join((np.array(header, np.int32).tobytes(), *columns))])
