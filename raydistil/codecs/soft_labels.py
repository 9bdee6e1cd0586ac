"""What the teacher says of N places over C classes or vocabulary entries: full logits, the K largest, or draws.

| codec     | ships, after a header of 16 bytes                      | bytes a place, C <= 65,536 | against exact KD  |
|-----------|--------------------------------------------------------|----------------------------|-------------------|
| `Logits`  | fp16 logits, or fp32 where there is one                | 2 C, or 4                  | fp16 rounding     |
| `TopK`    | ids, fp16 log-probabilities and log of the tail's mass | 4 K + 2                    | biased unless K=C |
| `Sampled` | distinct draws and their counts; how many are distinct | 3 a distinct draw + 1      | unbiased          |

Ids take 2 bytes more where C > 65,536, counts 1 more beyond 255 draws. Probabilities are those of
softmax(t / temperature). One logit is no class's but a number of any size (a regression): fp16 would round it by up to
2^-11 of itself, half of one at 1000, and end at 65,504. A buffer holds nothing but numbers and says itself how many
places and classes it is about.
Letters: N places, C classes, K kept, R draws, M entries of all places together.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raydistil.codecs.buffers import as_array, to_bytes, to_device
from raydistil.codecs.layout import HEADER_BYTES, LOGITS, MANY, SAMPLED, TOPK, WIDE, Readable
from raydistil.errors import ConfigError, ModelError
from raydistil.masking import row_keys, uniforms
from raydistil.types import Sparse

Key = int | NDArray[np.uint64]  # of all places, or one for each

_DRAW = 4  # the stream of random numbers; masking has the ones before
_MOST_DRAWS = 65_535
_PLACES_AT_ONCE = 16  # their probabilities fit a cache: five times faster on a CPU than all at once


@dataclass(frozen=True, slots=True)
class Logits:
    """Every logit in fp16 (Hinton et al. 2015, arXiv:1503.02531); the one number of a regression in fp32."""

    def bytes_per_place(self, num_classes: int) -> int:
        """Without the header."""
        return num_classes * logit_dtype(num_classes).itemsize

    def encode(self, logits_NC: Tensor, temperature: float, key: Key) -> bytes:
        """The logits as they are, whatever the temperature and the key. Raises ModelError where they do not fit."""
        kept_NC = logits_NC.to(logit_dtype(logits_NC.shape[1]))
        if not torch.isfinite(kept_NC).all():
            raise _unfit(logits_NC)
        return to_bytes(_header(LOGITS, kept_NC, 0), kept_NC)

    def decode(self, buffer: Readable, device: torch.device) -> Tensor:
        """The logits, of `logit_dtype`: whoever compares them widens a few places at a time."""
        array, places, classes, _ = _opened(buffer, LOGITS)
        logits_NC = to_device(array, device).view(logit_dtype(classes)).view(places, classes)
        return logits_NC.clone()  # the memory is not ours


@dataclass(frozen=True, slots=True)
class TopK:
    """The `k` most probable classes (all of them where there are fewer), and the mass of the rest."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"topk: expected k of at least 1, got {self.k}: 32 is a start")

    def bytes_per_place(self, num_classes: int) -> int:
        """Without the header."""
        return min(self.k, num_classes) * (_id_bytes(num_classes) + 2) + 2

    def encode(self, logits_NC: Tensor, temperature: float, key: Key) -> bytes:
        """Nothing is drawn: the key is not looked at. Raises ModelError where logits are not finite."""
        kept = min(self.k, logits_NC.shape[1])
        parts = [_largest(part_NC, temperature, kept) for part_NC in torch.split(_checked(logits_NC), _PLACES_AT_ONCE)]
        ids_NK, masses = (torch.cat(column) for column in zip(*parts, strict=True))
        logs = masses.log().to(torch.float16)
        return to_bytes(_header(TOPK, logits_NC, kept), ids_NK.to(_id_dtype(logits_NC.shape[1])), logs)

    def decode(self, buffer: Readable, device: torch.device) -> Sparse:
        """Scaled so that kept ones and tail sum to 1 after fp16's rounding; the tail is 0 where every class is kept."""
        array, places, classes, kept = _opened(buffer, TOPK)
        raw = to_device(array, device)
        end = places * kept * _id_bytes(classes)
        ids_NK = raw[:end].view(_id_dtype(classes)).to(torch.int64).view(places, kept)
        probs = raw[end:].view(torch.float16).view(places, kept + 1).float().softmax(-1)
        return Sparse(ids_NK, probs[:, :-1], probs[:, -1])


@dataclass(frozen=True, slots=True)
class Sampled:
    """`num_draws` draws with replacement, an unbiased estimate (Anshumann et al. 2025, "Sparse Logit Sampling").

    The draws of a place are a function of the key, the number of the place and its logits (or of the place's own key
    and its logits): whoever computes them, on whatever device, gets the same but where rounding moves a logit.
    """

    num_draws: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_draws <= _MOST_DRAWS:
            raise ConfigError(f"sampled: expected 1 to 65,535 draws, got {self.num_draws}: 50 is a start")

    def bytes_per_place(self, num_classes: int) -> int:
        """At most, without the header: the number of distinct draws differs from place to place."""
        count_bytes = _count_dtype(self.num_draws).itemsize
        return min(self.num_draws, num_classes) * (_id_bytes(num_classes) + count_bytes) + count_bytes

    def encode(self, logits_NC: Tensor, temperature: float, key: Key) -> bytes:
        """Raises ModelError where logits are not finite."""
        places, classes = logits_NC.shape
        uniforms_NR = _uniforms(logits_NC, self.num_draws, key)
        parts = zip(
            torch.split(_checked(logits_NC), _PLACES_AT_ONCE), torch.split(uniforms_NR, _PLACES_AT_ONCE), strict=True
        )
        drawn_NR = torch.cat([_draw(part_NC, temperature, part_NR) for part_NC, part_NR in parts])
        firsts_N1 = torch.arange(places, device=drawn_NR.device)[:, None] * classes
        found_M, counts_M = torch.unique(drawn_NR + firsts_N1, return_counts=True)
        distinct_N = torch.bincount(found_M // classes, minlength=places)
        dtype = _count_dtype(self.num_draws)
        ids_M = (found_M % classes).to(_id_dtype(classes))
        header = _header(SAMPLED, logits_NC, self.num_draws)
        return to_bytes(header, ids_M, counts_M.to(dtype), distinct_N.to(dtype))

    def decode(self, buffer: Readable, device: torch.device) -> Sparse:
        """Shares of the draws, as wide as the place with most distinct ones; the tail is 0."""
        array, places, classes, draws = _opened(buffer, SAMPLED)
        dtype = _count_dtype(draws)
        distinct_N = array[len(array) - places * dtype.itemsize :].view(f"u{dtype.itemsize}").astype(np.int64)
        width, entries = int(distinct_N.max(initial=0)), int(distinct_N.sum())
        raw, split = to_device(array, device), entries * _id_bytes(classes)
        ids_M = raw[:split].view(_id_dtype(classes)).to(torch.int64)
        counts_M = raw[split : split + entries * dtype.itemsize].view(dtype).float()
        there_NK = torch.arange(width, device=device) < torch.from_numpy(distinct_N).to(device)[:, None]
        ids_NK = torch.zeros_like(there_NK, dtype=torch.int64).masked_scatter_(there_NK, ids_M)
        probs_NK = torch.zeros_like(there_NK, dtype=torch.float32).masked_scatter_(there_NK, counts_M / draws)
        return Sparse(ids_NK, probs_NK, torch.zeros(places, device=device))


SoftLabelCodec = Logits | TopK | Sampled


def logit_dtype(num_classes: int) -> torch.dtype:
    """In which whole logits are kept."""
    return torch.float32 if num_classes == 1 else torch.float16


def _unfit(logits_NC: Tensor) -> ModelError:
    largest = logits_NC.abs().max().item()
    if logits_NC.shape[1] == 1:
        return ModelError(f"expected a finite number from the teacher, got {largest:.4g}: check the teacher's weights")
    return ModelError(
        f"expected teacher logits that fit fp16 (65,504), got {largest:.4g}: ship topk or sampled, or check "
        f"the teacher's weights where it is not finite"
    )


def _checked(logits_NC: Tensor) -> Tensor:
    """The same. Raises ModelError for nan and inf, and a place that is -inf throughout: such have no softmax."""
    largest_N = logits_NC.amax(-1)
    if not torch.isfinite(largest_N).all():
        raise ModelError(
            f"expected finite teacher logits, got {largest_N[~largest_N.isfinite()][0].item()}: set teacher.precision "
            f"to float32, or check the teacher's weights"
        )
    return logits_NC


def _probabilities(logits_NC: Tensor, temperature: float) -> Tensor:
    """softmax(t / temperature), float32."""
    return (logits_NC.float() / temperature).softmax(-1)


def _largest(logits_NC: Tensor, temperature: float, kept: int) -> tuple[Tensor, Tensor]:
    """(ids_NK, their probabilities and, last, that of all others [N, K + 1])."""
    probs_NC = _probabilities(logits_NC, temperature)
    probs_NK, ids_NK = probs_NC.topk(kept)
    tail_N1 = probs_NC.scatter_(-1, ids_NK, 0.0).sum(-1, keepdim=True)  # a sum of small ones, not 1 - large ones
    return ids_NK, torch.cat([probs_NK, tail_N1], -1)


def _uniforms(logits_NC: Tensor, num_draws: int, key: Key) -> Tensor:
    """float64 [N, R] in [0, 1), a row for each place, on the logits' device."""
    keys_N = row_keys(key, np.arange(len(logits_NC))) if isinstance(key, int) else key
    return torch.from_numpy(uniforms(keys_N, num_draws, _DRAW)).to(logits_NC.device)


def _draw(logits_NC: Tensor, temperature: float, uniforms_NR: Tensor) -> Tensor:
    """int64 [N, R]: the classes where the uniform numbers fall on the running sum of the probabilities.

    The sum is float64: in float32 its entries are 6e-8 apart near 1, and a class of less is drawn for its neighbours
    or never. Numbers are below 1, and the first entry *above* one is taken, so a class of probability 0 is not drawn.
    """
    sums_NC = _probabilities(logits_NC, temperature).double().cumsum_(-1)
    return torch.searchsorted(sums_NC, uniforms_NR * sums_NC[:, -1:], right=True)


def _header(kind: int, values_NC: Tensor, number: int) -> Tensor:
    return torch.tensor([kind, *values_NC.shape, number], dtype=torch.int32, device=values_NC.device)


def _opened(buffer: Readable, kind: int) -> tuple[NDArray[np.uint8], int, int, int]:
    """(what follows the header, N, C, and K or R)."""
    array = as_array(buffer)
    found, places, classes, number = array[:HEADER_BYTES].view(np.int32).tolist()
    assert found == kind, f"expected soft labels of kind {kind}, got {found}"
    return array[HEADER_BYTES:], places, classes, number


def _id_dtype(num_classes: int) -> torch.dtype:
    return torch.uint16 if num_classes <= WIDE else torch.int32


def _id_bytes(num_classes: int) -> int:
    return _id_dtype(num_classes).itemsize


def _count_dtype(num_draws: int) -> torch.dtype:
    return torch.uint8 if num_draws <= MANY else torch.uint16
