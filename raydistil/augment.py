"""Variants of labelled texts for the teacher to label: cut, joined with each other, some of their tokens changed.

A text the teacher has not seen in training is where its soft labels say the most. A share of the rows stays as it is;
others become a part of themselves, or parts of two in a row; then tokens are masked, replaced or dropped (masking and
cutting: Tang et al. 2019, arXiv:1903.12136; dropping and replacing: Wei and Zou 2019, arXiv:1901.11196; parts of two
texts, as in MixKD, Liang et al. 2021, arXiv:2011.00593, but of tokens, not embeddings). Of a pair each text is changed,
and joining gives it the second text of another pair. A changed row keeps its soft labels alone: its own label may not
hold any more.

All is a function of (seed, visit of the row). Lengths never exceed the micro-batch's padded length. `[CLS]` and `[SEP]`
stay where they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from raydistil.config.targets import AugmentConfig
from raydistil.manifest import keyed
from raydistil.masking import row_keys
from raydistil.packing import longest_first
from raydistil.types import IGNORE, Labels, TokenBatch

Ids = NDArray[np.int32]
Texts = tuple[Ids, ...]  # of a row: one, or two
_AUGMENT = 6  # a stream of random numbers apart from those of masking, sampling and drawing


@dataclass(frozen=True, slots=True)
class Words:
    """What the changes are made of."""

    pad_id: int
    mask_id: int
    counts_V: NDArray[np.int64]  # how often each token occurs in the training split: what replaces others
    special_ids: tuple[int, ...]
    joint: tuple[int, ...] = ()  # what stands between the texts of a pair

    def drawer(self) -> Callable[[np.random.Generator, int], Ids]:
        """Draws ordinary tokens as often as they occur."""
        counts = self.counts_V.copy()
        counts[list(self.special_ids)] = 0
        sums = np.cumsum(counts)
        return lambda random, number: np.searchsorted(sums, random.integers(0, sums[-1], number), "right").astype(
            np.int32
        )


def augment(batch: TokenBatch, partner: TokenBatch, config: AugmentConfig, words: Words, seed: int) -> TokenBatch:
    """`batch` with some of its rows changed, and those without a label. Row b may be joined with part of partner b."""
    assert batch.labels_B is not None
    joint = np.array(words.joint, np.int32)
    room = batch.input_ids_BL.shape[1] - 2 - len(joint)
    rows, partners = _texts(batch, len(joint)), _texts(partner, len(joint))
    keys_B = row_keys(int(keyed(seed, _AUGMENT)), batch.visits_B)
    draw = words.drawer()
    chosen = []
    for own, other, key in zip(rows, partners, keys_B.tolist(), strict=True):
        random = np.random.default_rng(key)
        kept = random.random() < config.keep
        chosen.append(own if kept else _fitted(_changed(own, other, config, words.mask_id, draw, random), room))
    same_B = np.array([all(map(np.array_equal, old, new)) for old, new in zip(rows, chosen, strict=True)])
    return replace(
        batch,
        input_ids_BL=_framed(batch, chosen, joint, words.pad_id),
        lengths_B=np.array([sum(map(len, texts)) + len(joint) + 2 for texts in chosen], np.int32),
        labels_B=_kept_where(same_B, batch.labels_B),
        contexts_B=None if batch.contexts_B is None else _starts(chosen, len(joint)),
    )


def _starts(rows: list[Texts], joint: int) -> Ids:
    """Of the second texts."""
    return np.array([1 + len(first) + joint for first, _ in rows], np.int32)


def _kept_where(same_B: NDArray[np.bool_], labels_B: Labels) -> Labels:
    kept_B = labels_B.copy()
    kept_B[~same_B] = IGNORE if labels_B.dtype == np.int32 else np.nan
    return kept_B


def _texts(batch: TokenBatch, joint: int) -> list[Texts]:
    """Each row without its padding and its special tokens."""
    rows = zip(batch.input_ids_BL, batch.lengths_B, strict=True)
    if batch.contexts_B is None:
        return [(row[1 : length - 1],) for row, length in rows]
    pairs = zip(rows, batch.contexts_B, strict=True)
    return [(row[1 : start - joint], row[start : length - 1]) for (row, length), start in pairs]


def _fitted(texts: Texts, room: int) -> Texts:
    if len(texts) == 1:
        return (texts[0][:room],)
    kept = longest_first(len(texts[0]), len(texts[1]), room)
    return texts[0][: kept[0]], texts[1][: kept[1]]


def _changed(
    own: Texts, other: Texts, config: AugmentConfig, mask_id: int, draw: Callable[[np.random.Generator, int], Ids],
    random: np.random.Generator,
) -> Texts:  # fmt: skip
    """One row after joining or cutting, then masking, replacing and dropping."""
    kind, share = random.random(), random.random()
    if kind < config.join:
        own = _joined(own, other, 0.25 + 0.5 * share, random)
    elif kind < config.join + config.cut:
        own = tuple(_part(text, 0.2 + 0.7 * share, random) for text in own)
    return tuple(_noisy(text, config, mask_id, draw, random) for text in own)


def _joined(own: Texts, other: Texts, cut: float, random: np.random.Generator) -> Texts:
    if len(own) == 2:
        return own[0], other[1]
    return (np.concatenate([_part(own[0], cut, random), _part(other[0], 1 - cut, random)]),)


def _noisy(
    own: Ids, config: AugmentConfig, mask_id: int, draw: Callable[[np.random.Generator, int], Ids],
    random: np.random.Generator,
) -> Ids:  # fmt: skip
    place_T = random.random(len(own))
    edges = np.cumsum([config.mask, config.replace, config.drop])
    own = np.where(place_T < edges[0], np.int32(mask_id), own)
    own = np.where((place_T >= edges[0]) & (place_T < edges[1]), draw(random, len(own)), own)
    left_T = (place_T < edges[1]) | (place_T >= edges[2])
    return own[left_T] if left_T.any() else own


def _part(body: Ids, share: float, random: np.random.Generator) -> Ids:
    """So much of it, from a random place on; one token at least where there is one."""
    length = min(len(body), max(1, round(len(body) * share)))
    start = int(random.integers(0, len(body) - length + 1))
    return body[start : start + length]


def _framed(batch: TokenBatch, rows: list[Texts], joint: Ids, pad_id: int) -> Ids:
    """[B, L]: the texts of each row between its own first and last token, then padding."""
    framed_BL = np.full_like(batch.input_ids_BL, pad_id)
    for row, (texts, old, length) in enumerate(zip(rows, batch.input_ids_BL, batch.lengths_B, strict=True)):
        body = np.concatenate([texts[0], *(part for text in texts[1:] for part in (joint, text))])
        framed_BL[row, : len(body) + 2] = np.concatenate([old[:1], body, old[length - 1 : length]])
    return framed_BL
