"""Packed blocks of several documents, for causal language models: where each begins, and what follows each token.

A token attends to earlier tokens of its own document alone and positions count from 0 in each, so a block gives what
its documents give one by one. `positions_BL` says it all: a document begins where it is 0. Padding is 0 throughout, and
so a document a token, which attends to itself.
"""

import numpy as np
from numpy.typing import NDArray

from raydistil.types import IGNORE

Int32s = NDArray[np.int32]


def positions_of(starts_BL: NDArray[np.uint8]) -> Int32s:
    """[B, L] place of each token in its document, from 0; `starts_BL` is 1 where one begins, as every row does."""
    places_L = np.arange(starts_BL.shape[1])
    begun_BL = np.maximum.accumulate(np.where(starts_BL > 0, places_L, 0), axis=1)
    return (places_L - begun_BL).astype(np.int32)


def next_tokens(ids_BL: Int32s, positions_BL: Int32s) -> Int32s:
    """[B, L] the token after each one in its document; IGNORE at the document's last token and at padding."""
    labels_BL = np.full_like(ids_BL, IGNORE)
    labels_BL[:, :-1] = np.where(positions_BL[:, 1:] > 0, ids_BL[:, 1:], IGNORE)
    return labels_BL
