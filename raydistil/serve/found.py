"""What is found in a text: entities of words with classes, spans that answer a question; by their characters."""

import numpy as np
from numpy.typing import NDArray

from raydistil.scores.answers import span_scores
from raydistil.scores.entities import OUTSIDE, entities, marks_entities
from raydistil.serve.schema import Answer, Entity
from raydistil.serve.texts import Encoded, words

Floats = NDArray[np.float32]


def entities_of(text: str, encoded: Encoded, shares_LC: Floats, labels: list[str]) -> list[Entity]:
    """Of words whose classes mark them; of other classes, each word but for `O` is one."""
    places = list(words(encoded.places, text))
    firsts = [token for token, _, _ in places]
    best_N = shares_LC[firsts].argmax(-1) if firsts else np.empty(0, np.int64)
    scores = shares_LC[firsts, best_N].tolist() if firsts else []
    tags = [labels[n] for n in best_N]
    if marks_entities(tuple(labels)):
        found = sorted(entities(tags))
    else:
        found = [(n, n + 1, tag) for n, tag in enumerate(tags) if tag != OUTSIDE]
    return [
        Entity(
            label=kind, score=float(np.mean(scores[first:end])), start=places[first][1], end=places[end - 1][2],
            text=text[places[first][1] : places[end - 1][2]],
        )
        for first, end, kind in found
    ]  # fmt: skip


def answers_of(
    context: str, windows: list[Encoded], logits: list[Floats], count: int
) -> tuple[list[Answer], float]:  # fmt: skip
    """(the best spans of all windows, none of which is part of another; the least score of [CLS])."""
    spans = sorted(
        (span for each, both in zip(windows, logits, strict=True) for span in _spans(each, both, count)), reverse=True
    )
    kept = list[tuple[float, int, int]]()
    for score, start, end in spans:
        if len(kept) < count and not any(start < other_end and other < end for _, other, other_end in kept):
            kept.append((score, start, end))
    answers = [Answer(text=context[start:end], score=score, start=start, end=end) for score, start, end in kept]
    return answers, min(float(both[0, 0] + both[1, 0]) for both in logits)


def _spans(window: Encoded, logits_2L: Floats, count: int) -> list[tuple[float, int, int]]:
    """(score, first character, the one after the last) of the best of one window; some may overlap."""
    places = np.arange(logits_2L.shape[1])
    inside_L = (window.places[:, 0] >= 0) & (places >= (window.context or 0))
    scores = span_scores(logits_2L[0], logits_2L[1], inside_L).ravel()
    best = np.argsort(-scores, kind="stable")[: 50 * count]
    return [
        (float(scores[n]), int(window.places[n // len(places), 0]), int(window.places[n % len(places), 1]))
        for n in best
        if np.isfinite(scores[n])
    ]
