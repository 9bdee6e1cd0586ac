"""Masked-LM corruption as a pure function of a key, so the same tokens are masked whoever makes the batch.

15 % of the tokens are chosen; of those 80 % become [MASK], 10 % a random token, 10 % stay (Devlin et al. 2019).
`uniform` chooses each token alike, keyed by (seed, position). `frequency` draws, over a whole micro-batch and without
replacement, with probability ~ count^-0.7 (Sanh et al. 2019), keyed by (seed, micro-batch). Where a row's mask must not
hang on the rows beside it, `frequency` draws over each row apart, keyed by (seed, position) too.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from raydistil.config import MaskingConfig
from raydistil.manifest import keyed, mix
from raydistil.types import IGNORE

Int32s = NDArray[np.int32]
Bools = NDArray[np.bool_]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CHOOSE, _CORRUPT, _REPLACE = 1, 2, 3  # separate streams of random numbers


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What masking must know of the tokenizer."""

    size: int
    mask_id: int
    special_ids: tuple[int, ...]
    counts_V: NDArray[np.int64] | None  # how often each token occurs in the training split


def uniforms(keys_B: NDArray[np.uint64], length: int, stream: int) -> NDArray[np.float64]:
    """[B, length] numbers in [0, 1), row b a function of (keys_B[b], stream) alone."""
    columns = np.arange(1, length + 1, dtype=np.uint64) * _GOLDEN
    offset = np.uint64(stream * 0xD1B54A32D192ED03 & 0xFFFFFFFFFFFFFFFF)
    state = mix(keys_B[:, None] + offset) + columns[None, :]
    return (mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def row_keys(seed: int, positions_B: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One key a row, a function of (seed, position)."""
    return mix(mix(positions_B.astype(np.uint64) + _GOLDEN) + keyed(seed))


def mask_tokens(
    input_ids_BL: Int32s, lengths_B: Int32s, config: MaskingConfig, vocabulary: Vocabulary, seed: int,
    index: int | None, positions_B: NDArray[np.int64],
) -> tuple[Int32s, Int32s]:  # fmt: skip
    """(corrupted ids, labels), both int32 [B, L]; labels are IGNORE where nothing was chosen.

    `index` None: a row's outcome is a function of its own tokens and (seed, position).
    """
    candidates_BL = _candidates(input_ids_BL, lengths_B, vocabulary)
    keys_B = row_keys(seed, positions_B)
    if config.kind == "uniform":
        chosen_BL = candidates_BL & (uniforms(keys_B, input_ids_BL.shape[1], _CHOOSE) < config.share)
    else:
        draw = partial(_draw_by_frequency, config=config, vocabulary=vocabulary)
        if index is not None:
            chosen_BL = draw(input_ids_BL, lengths_B, candidates_BL, key=keyed(seed, index))
        else:
            rows = (slice(n, n + 1) for n in range(len(lengths_B)))
            parts = [draw(input_ids_BL[r], lengths_B[r], candidates_BL[r], key=keys_B[r.start]) for r in rows]
            chosen_BL = np.concatenate(parts)
    labels_BL = np.where(chosen_BL, input_ids_BL, IGNORE).astype(np.int32)
    return _corrupt(input_ids_BL, chosen_BL, keys_B, vocabulary), labels_BL


def _candidates(input_ids_BL: Int32s, lengths_B: Int32s, vocabulary: Vocabulary) -> Bools:
    real_BL = np.arange(input_ids_BL.shape[1])[None, :] < lengths_B[:, None]
    return real_BL & ~np.isin(input_ids_BL, vocabulary.special_ids)


def _draw_by_frequency(
    input_ids_BL: Int32s, lengths_B: Int32s, candidates_BL: Bools, config: MaskingConfig, vocabulary: Vocabulary,
    key: np.uint64,
) -> Bools:  # fmt: skip
    """Exactly ceil(share * real tokens) draws without replacement, by the Gumbel-top-k trick (Kool et al. 2019)."""
    if vocabulary.counts_V is None:
        raise AssertionError("frequency masking needs token counts")
    wanted = min(int(np.ceil(config.share * lengths_B.sum())), int(candidates_BL.sum()))
    chosen = np.zeros(input_ids_BL.size, np.bool_)
    if wanted:
        weights = -config.smoothing * np.log(np.maximum(vocabulary.counts_V, 1))[input_ids_BL.ravel()]
        draws = uniforms(np.array([key]), input_ids_BL.size, _CHOOSE)[0]
        scores = np.where(candidates_BL.ravel(), weights - np.log(-np.log(draws + 2.0**-54)), -np.inf)
        chosen[np.argpartition(-scores, wanted - 1)[:wanted]] = True
    return chosen.reshape(input_ids_BL.shape)


def _corrupt(input_ids_BL: Int32s, chosen_BL: Bools, keys_B: NDArray[np.uint64], vocabulary: Vocabulary) -> Int32s:
    length = input_ids_BL.shape[1]
    kind_BL = uniforms(keys_B, length, _CORRUPT)
    random_BL = (uniforms(keys_B, length, _REPLACE) * vocabulary.size).astype(np.int32)
    corrupted = np.where(chosen_BL & (kind_BL < 0.8), vocabulary.mask_id, input_ids_BL)
    corrupted = np.where(chosen_BL & (kind_BL >= 0.9), random_BL, corrupted)
    return corrupted.astype(np.int32)
