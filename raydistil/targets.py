"""A teacher's targets of one micro-batch, as they cross the wire and as the student's side has them back.

Hidden states travel one after the other in one column, in the order of `TargetsSpec.states`; soft labels in another.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raydistil.codecs.buffers import Readable
from raydistil.codecs.soft_labels import Logits, Sampled, SoftLabelCodec, TopK
from raydistil.codecs.states import decode_states, encode_states
from raydistil.config.loss import LossConfig
from raydistil.config.targets import TargetsConfig
from raydistil.layers import LayerPlan
from raydistil.manifest import keyed, mix
from raydistil.masking import row_keys
from raydistil.specs import TargetsSpec
from raydistil.types import Task, TeacherTargets

COLUMNS = ("states", "soft_labels")
_DRAWS = 5  # a stream of random numbers apart from those of masking and sampling


def soft_label_codec(config: TargetsConfig) -> SoftLabelCodec:
    """What carries logits, where it is not the last hidden state."""
    if config.codec == "topk":
        return TopK(config.top_k)
    return Sampled(config.num_draws) if config.codec == "sampled" else Logits()


def makes_logits(config: TargetsConfig, loss: LossConfig, task: Task) -> bool:
    """Whether the student's side makes a language model's soft labels, of the last state and the teacher's head."""
    return config.codec == "hidden" and task != "classification" and loss.kd > 0


def targets_spec(config: TargetsConfig, loss: LossConfig, task: Task, layers: LayerPlan, seed: int) -> TargetsSpec:
    """What a run asks of its teacher."""
    soft_labels = loss.kd > 0 and not makes_logits(config, loss, task)
    return TargetsSpec(config, loss, layers.teacher_states, soft_labels, seed)


def encode_targets(
    spec: TargetsSpec, index: int, states: dict[int, Tensor], logits_NC: Tensor | None,
    visits_N: NDArray[np.int64] | None = None,
) -> dict[str, bytes]:  # fmt: skip
    """The columns of micro-batch `index`; `logits_NC` only where `spec` wants soft labels.

    `visits_N`: of each place's row, where what is drawn there is to hang on that and not on the micro-batch.

    Raises ModelError where a number does not fit the format.
    """
    columns = {
        "states": b"".join(encode_states(states[n], spec.config.states) for n in spec.states),
        "soft_labels": b"",
    }
    if spec.soft_labels:
        assert logits_NC is not None
        key = int(keyed(spec.seed, index, _DRAWS)) if visits_N is None else _place_keys(spec.seed, visits_N)
        columns["soft_labels"] = soft_label_codec(spec.config).encode(logits_NC, spec.loss.temperature, key)
    return columns


def _place_keys(seed: int, visits_N: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A key for each place: a function of its row's visit and its number among that row's places."""
    firsts_N = np.concatenate([[True], visits_N[1:] != visits_N[:-1]])[: len(visits_N)]
    places_N = np.arange(len(visits_N))
    numbers_N = places_N - np.maximum.accumulate(np.where(firsts_N, places_N, 0))
    keys_N = row_keys(int(keyed(seed, _DRAWS)), visits_N)
    return mix(keys_N ^ row_keys(0, numbers_N))


def decode_targets(
    spec: TargetsSpec, columns: dict[str, Readable], num_tokens: int, device: torch.device
) -> TeacherTargets:
    """What `encode_targets` was given, rounded by the format, float32 on `device`."""
    whole = memoryview(columns["states"])
    size = len(whole) // max(1, len(spec.states))
    parts = {n: whole[place * size : (place + 1) * size] for place, n in enumerate(spec.states)}
    states = {n: decode_states(part, num_tokens, spec.config.states, device) for n, part in parts.items()}
    if not spec.soft_labels:
        return TeacherTargets(states, None)
    return TeacherTargets(states, soft_label_codec(spec.config).decode(columns["soft_labels"], device))
