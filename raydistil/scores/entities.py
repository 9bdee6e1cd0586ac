"""Entities in words with classes, as CoNLL-2000 and -2003 count them (Tjong Kim Sang and De Meulder 2003).

Classes are `O`, or a kind behind `B-` (the first word of an entity) or `I-` (a word that goes on with it). An `I-`
after another kind, or after `O`, begins one too.
"""

import numpy as np
from numpy.typing import NDArray

from raydistil.scores import bootstrapped
from raydistil.types import Score

OUTSIDE = "O"
Entity = tuple[int, int, str]  # first word, the word after the last, kind


def marks_entities(labels: tuple[str, ...]) -> bool:
    """Whether these classes are of that form."""
    return any(label.startswith("B-") for label in labels) and all(
        label == OUTSIDE or label[:2] in ("B-", "I-") for label in labels
    )


def entities(tags: list[str]) -> set[Entity]:
    found, start = set(), 0
    for place, (before, tag) in enumerate(zip([OUTSIDE, *tags], [*tags, OUTSIDE], strict=True)):
        goes_on = tag.startswith("I-") and before[2:] == tag[2:]
        if before != OUTSIDE and not goes_on:
            found.add((start, place, before[2:]))
        if tag != OUTSIDE and not goes_on:
            start = place
    return found


def entity_f1(truth: list[list[str]], said: list[list[str]]) -> Score:
    """Of all entities of all rows together: 2 found / (known + named); 1 where there are none of either."""
    pairs = [(entities(known), entities(named)) for known, named in zip(truth, said, strict=True)]
    counts_N2 = np.array([(2 * len(known & named), len(known) + len(named)) for known, named in pairs])
    return bootstrapped("entity F1", len(pairs), lambda rows: _ratio(counts_N2[rows].sum(0)))


def _ratio(counts_2: NDArray[np.int64]) -> float:
    return float(counts_2[0] / counts_2[1]) if counts_2[1] else 1.0
