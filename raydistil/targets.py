"""A teacher's targets of one micro-batch, as they cross the wire and as the student's side has them back.

Hidden states travel one after the other in one column, in the order of `TargetsSpec.states`; soft labels in another, in
parts of some places each, so that the teacher's [N, V] logits need never exist as a whole.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from raydistil.codecs.layout import Readable, joined, parted
from raydistil.codecs.soft_labels import Logits, Sampled, SoftLabelCodec, TopK
from raydistil.codecs.states import decode_states, encode_states
from raydistil.config.loss import LossConfig
from raydistil.config.targets import TargetsConfig
from raydistil.layers import LayerPlan
from raydistil.manifest import keyed, mix
from raydistil.masking import row_keys
from raydistil.places import sent_places
from raydistil.specs import TargetsSpec
from raydistil.types import Sparse, Task, TeacherTargets, TokenBatch, models_language

PLACES_AT_ONCE = 512  # whose vocabulary logits a teacher makes before it encodes them
_DRAWS = 5  # a stream of random numbers apart from those of masking and sampling


def soft_label_codec(config: TargetsConfig) -> SoftLabelCodec:
    """What carries logits, where it is not the last hidden state."""
    if config.codec == "topk":
        return TopK(config.top_k)
    return Sampled(config.num_draws) if config.codec == "sampled" else Logits()


def makes_logits(config: TargetsConfig, loss: LossConfig, task: Task) -> bool:
    """Whether the student's side makes a language model's soft labels, of the last state and the teacher's head."""
    return config.codec == "hidden" and models_language(task) and loss.kd > 0


def targets_spec(config: TargetsConfig, loss: LossConfig, task: Task, layers: LayerPlan, seed: int) -> TargetsSpec:
    """What a run asks of its teacher."""
    soft_labels = loss.kd > 0 and not makes_logits(config, loss, task)
    compared = layers.logits_alone and config.cache is None
    return TargetsSpec(config, loss, layers.teacher_states, soft_labels, seed, compared)


def encode_targets(
    spec: TargetsSpec, visits_N: NDArray[np.int64], states: dict[int, Tensor], logits: Tensor | Iterable[Tensor] | None
) -> dict[str, bytes]:
    """The columns of a micro-batch; `logits` [N, C], or parts of some of the N, where `spec` wants soft labels.

    `visits_N`: of each place's row; what is drawn at a place hangs on that and on its number among its row's places.

    Raises ModelError where a number does not fit the format.
    """
    columns = {
        "states": b"".join(encode_states(states[n], spec.config.states) for n in spec.states),
        "soft_labels": b"",
    }
    if spec.soft_labels:
        assert logits is not None
        parts = [logits] if isinstance(logits, Tensor) else logits
        columns["soft_labels"] = joined(_encoded(spec, _place_keys(spec.seed, visits_N), parts))
    return columns


def _encoded(spec: TargetsSpec, keys_N: NDArray[np.uint64], parts: Iterable[Tensor]) -> Iterator[bytes]:
    codec, start = soft_label_codec(spec.config), 0
    for part_nC in parts:
        yield codec.encode(part_nC, spec.loss.temperature, keys_N[start : start + len(part_nC)])
        start += len(part_nC)


def _place_keys(seed: int, visits_N: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A key for each place: a function of its row's visit and its number among that row's places."""
    firsts_N = np.concatenate([[True], visits_N[1:] != visits_N[:-1]])[: len(visits_N)]
    places_N = np.arange(len(visits_N))
    numbers_N = places_N - np.maximum.accumulate(np.where(firsts_N, places_N, 0))
    keys_N = row_keys(int(keyed(seed, _DRAWS)), visits_N)
    return mix(keys_N ^ row_keys(0, numbers_N))


def targets_for(
    spec: TargetsSpec, columns: dict[str, Readable], batch: TokenBatch, device: torch.device
) -> TeacherTargets:
    """What the teacher said of a micro-batch; see `decode_targets`."""
    sent = int(sent_places(batch, spec.loss, spec.seed).sum()) if spec.compared else batch.num_tokens
    return decode_targets(spec, columns, sent, device)


def decode_targets(
    spec: TargetsSpec, columns: dict[str, Readable], num_tokens: int, device: torch.device
) -> TeacherTargets:
    """What `encode_targets` was given, rounded by the format, float32 on `device`. `num_tokens`: of each state."""
    whole = memoryview(columns["states"])
    size = len(whole) // max(1, len(spec.states))
    columns_by_state = {n: whole[place * size : (place + 1) * size] for place, n in enumerate(spec.states)}
    states = {n: decode_states(part, num_tokens, spec.config.states, device) for n, part in columns_by_state.items()}
    if not spec.soft_labels:
        return TeacherTargets(states, None, spec.compared)
    codec = soft_label_codec(spec.config)
    parts = [codec.decode(part, device) for part in parted(columns["soft_labels"])]
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
