"""The places of a language-modelling micro-batch whose distributions are compared, the same for teacher and student."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raydistil.config.loss import LossConfig
from raydistil.masking import row_keys, uniforms
from raydistil.types import IGNORE, TokenBatch

_SAMPLE = 4  # a stream of random numbers apart from those of the masking
EVEN = 32  # products have a multiple of so many rows: as many as a kernel takes at once


@dataclass(frozen=True, slots=True)
class Places:
    """Real tokens, row after row: which of them are compared at all, and which of those with soft labels."""

    at_T: NDArray[np.bool_]
    kd_N: NDArray[np.bool_]
    labels_N: NDArray[np.int64]  # IGNORE where there is none


def compared_places(batch: TokenBatch, loss: LossConfig, seed: int) -> Places:
    """Where `loss` looks: at `loss.kd_positions`, and wherever a token is to be found where the task has a weight.

    With a causal LM that is never a document's last token: nothing follows it.
    """
    assert batch.labels_BL is not None
    real_BL = np.arange(batch.labels_BL.shape[1])[None, :] < batch.lengths_B[:, None]
    labels_T = batch.labels_BL[real_BL].astype(np.int64)
    kd_T = np.zeros(len(labels_T), np.bool_)
    if loss.kd:
        comparable_T = labels_T != IGNORE if batch.positions_BL is not None else np.ones_like(kd_T)
        kd_T = comparable_T & _kd_positions(batch, real_BL, loss, seed)
    at_T = kd_T | (labels_T != IGNORE) if loss.task else kd_T
    return Places(at_T, kd_T[at_T], labels_T[at_T])


def sent_places(batch: TokenBatch, loss: LossConfig, seed: int) -> NDArray[np.bool_]:
    """Those that are compared at all; the first token where none is, since what is sent is never nothing."""
    at_T = compared_places(batch, loss, seed).at_T
    return at_T if at_T.any() else np.arange(len(at_T)) == 0


def evened(at_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """[M]: `at_N`, and its first again for as long as their number is not EVEN's: rows to be left out of what counts.

    So that the shapes of products are few: for each new one oneDNN makes machine code, in milliseconds, and keeps it.
    """
    return np.concatenate([at_N, np.repeat(at_N[:1], -len(at_N) % EVEN)])


def said_of_rows(batch: TokenBatch) -> NDArray[np.int64]:
    """[B] how many rows of logits a head gives of each of the micro-batch's; see `heads`."""
    if batch.tags_BL is not None:
        return batch.lengths_B.astype(np.int64)
    return np.full(len(batch.lengths_B), 1 if batch.spans_B2 is None else 2, np.int64)


def compared_share(loss: LossConfig, masked: float) -> float:
    """The share of a language model's tokens that `compared_places` finds, `masked` of them having a label."""
    kd = {"all": 1.0, "sample": loss.kd_sample, "masked": masked}[loss.kd_positions] if loss.kd else 0.0
    if loss.kd_positions == "sample" and loss.task:  # each drawn for itself
        return 1 - (1 - kd) * (1 - masked)
    return max(kd, masked if loss.task else 0.0)


def _kd_positions(batch: TokenBatch, real_BL: NDArray[np.bool_], loss: LossConfig, seed: int) -> NDArray[np.bool_]:
    assert batch.labels_BL is not None
    if loss.kd_positions == "all":
        return np.ones(int(real_BL.sum()), np.bool_)
    if loss.kd_positions == "sample":
        uniforms_BL = uniforms(row_keys(seed, batch.visits_B), real_BL.shape[1], _SAMPLE)
        chosen: NDArray[np.bool_] = uniforms_BL[real_BL] < loss.kd_sample
        return chosen
    masked: NDArray[np.bool_] = batch.labels_BL[real_BL] != IGNORE
    return masked
