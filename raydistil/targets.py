"""A teacher's targets of one micro-batch, as they cross the wire and as the student's side has them back.

Hidden states travel one after the other in one column, in the order of `TargetsSpec.states`; soft labels in another, in
parts of some places each, so that the teacher's [N, V] logits need never exist as a whole.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raydistil.codecs.buffers import Readable
from raydistil.codecs.soft_labels import Logits, Sampled, SoftLabelCodec, TopK
from raydistil.codecs.states import decode_states, encode_states
from raydistil.config import TargetsConfig
from raydistil.manifest import keyed
from raydistil.specs import TargetsSpec
from raydistil.types import Sparse, TeacherTargets

PLACES_AT_ONCE = 512  # whose vocabulary logits a teacher makes before it encodes them
_DRAWS = 5  # a stream of random numbers apart from those of masking and sampling


def soft_label_codec(config: TargetsConfig) -> SoftLabelCodec:
    """What carries logits, where it is not the last hidden state."""
    if config.codec == "topk":
        return TopK(config.top_k)
    return Sampled(config.num_draws) if config.codec == "sampled" else Logits()


def encode_targets(
    spec: TargetsSpec, index: int, states: dict[int, Tensor], logits: Tensor | Iterable[Tensor] | None
) -> dict[str, bytes]:
    """The columns of micro-batch `index`; `logits` [N, C], or parts of some of the N, where `spec` wants soft labels.

    Raises ModelError where a number does not fit the format.
    """
    columns = {
        "states": b"".join(encode_states(states[n], spec.config.states) for n in spec.states),
        "soft_labels": b"",
    }
    if spec.soft_labels:
        assert logits is not None
        columns["soft_labels"] = _joined(_encoded(spec, index, [logits] if isinstance(logits, Tensor) else logits))
    return columns


def _encoded(spec: TargetsSpec, index: int, parts: Iterable[Tensor]) -> Iterator[bytes]:
    """Every part has random numbers of its own."""
    codec = soft_label_codec(spec.config)
    for number, part_nC in enumerate(parts):
        key = int(keyed(spec.seed, index, _DRAWS, number))
        yield codec.encode(part_nC, spec.loss.temperature, key)


def _joined(parts: Iterable[bytes]) -> bytes:
    """int64 number of parts and the size of each, then the parts, each from a multiple of 8 bytes on."""
    buffers = list(parts)
    header = np.array([len(buffers), *map(len, buffers)], np.int64).tobytes()
    return b"".join([header, *(buffer + bytes(-len(buffer) % 8) for buffer in buffers)])


def _parted(buffer: Readable) -> Iterator[Readable]:
    """What `_joined` was given, as views."""
    whole = memoryview(buffer)
    count = int(np.frombuffer(whole[:8], np.int64)[0])
    start = 8 * (1 + count)
    for size in np.frombuffer(whole[8:start], np.int64).tolist():
        yield whole[start : start + size]
        start += size + -size % 8


def decode_targets(
    spec: TargetsSpec, columns: dict[str, Readable], num_tokens: int, device: torch.device
) -> TeacherTargets:
    """What `encode_targets` was given, rounded by the format, float32 on `device`."""
    whole = memoryview(columns["states"])
    size = len(whole) // max(1, len(spec.states))
    columns_by_state = {n: whole[place * size : (place + 1) * size] for place, n in enumerate(spec.states)}
    states = {n: decode_states(part, num_tokens, spec.config.states, device) for n, part in columns_by_state.items()}
    if not spec.soft_labels:
        return TeacherTargets(states, None)
    codec = soft_label_codec(spec.config)
    parts = [codec.decode(part, device) for part in _parted(columns["soft_labels"])]
    return TeacherTargets(states, _together(parts))


def _together(parts: list[Tensor | Sparse]) -> Tensor | Sparse:
    """The places of all parts, one after the other; sparse ones as wide as the widest."""
    if len(parts) == 1:
        return parts[0]
    sparse = [part for part in parts if isinstance(part, Sparse)]
    if not sparse:
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    width = max(part.ids_NK.shape[1] for part in sparse)
    ids_NK, probs_NK = (
        torch.cat([F.pad(part, (0, width - part.shape[1])) for part in column])
        for column in ([part.ids_NK for part in sparse], [part.probs_NK for part in sparse])
    )
    return Sparse(ids_NK, probs_NK, torch.cat([part.tail_N for part in sparse]))
