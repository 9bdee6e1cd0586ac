"""Answers to questions: the best span of several windows, how much of it is right (SQuAD, Rajpurkar et al. 2016)."""

import re
import string
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raydistil.scores import bootstrapped
from raydistil.types import Score

Floats = NDArray[np.floating[Any]]
LONGEST = 30  # tokens of an answer
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class Span:
    """An answer by its characters in the context, or what stands for there being none."""

    score: float  # sum of the logits of its start and its end
    start: int = 0
    end: int = 0


NOTHING = Span(-np.inf)


@dataclass(frozen=True, slots=True)
class Found:
    """What the windows of one question say so far."""

    best: Span = NOTHING
    lacking: float = np.inf  # the least score of [CLS], which every window must have where there is no answer

    def after(self, starts_L: Floats, ends_L: Floats, chars_L2: NDArray[np.int32]) -> "Found":
        """`chars_L2`: where each token of the window stands in the context, -1 for others."""
        best = max(self.best, best_span(starts_L, ends_L, chars_L2), key=lambda span: span.score)
        return Found(best, min(self.lacking, float(starts_L[0] + ends_L[0])))

    def answer(self, context: str, may_lack: bool) -> str:
        """Nothing where that is likelier, if there may be no answer (Rajpurkar et al. 2018, SQuAD 2.0)."""
        lacks = may_lack and self.lacking >= self.best.score
        return "" if lacks else context[self.best.start : self.best.end]


def span_scores(starts_L: Floats, ends_L: Floats, inside_L: NDArray[np.bool_]) -> Floats:
    """[L, L] of every span from one token to another, -inf of those that are none, too long, or not inside."""
    places = np.arange(len(starts_L))
    long_LL = places[None, :] - places[:, None]
    allowed_LL = (long_LL >= 0) & (long_LL < LONGEST) & inside_L[:, None] & inside_L[None, :]
    scores: Floats = np.where(allowed_LL, starts_L[:, None] + ends_L[None, :], -np.inf)
    return scores


def best_span(starts_L: Floats, ends_L: Floats, chars_L2: NDArray[np.int32]) -> Span:
    """Of one window."""
    scores_LL = span_scores(starts_L, ends_L, chars_L2[:, 0] >= 0)
    first, last = divmod(int(scores_LL.argmax()), len(starts_L))
    score = float(scores_LL[first, last])
    return Span(score, int(chars_L2[first, 0]), int(chars_L2[last, 1])) if np.isfinite(score) else NOTHING


def normalized(answer: str) -> list[str]:
    """Its words in lower case, without punctuation and articles."""
    return ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION)).split()


def overlap_f1(said: str, known: str) -> float:
    """Of the words they share; where one of them is empty, whether both are."""
    left, right = normalized(said), normalized(known)
    if not left or not right:
        return float(left == right)
    shared = (Counter(left) & Counter(right)).total()
    return 2 * shared / (len(left) + len(right))


def answer_scores(said: list[str], known: list[list[str]]) -> tuple[Score, float]:
    """(mean F1, share of exact matches): each with the known answer it is nearest to, none being an empty one."""
    pairs = [(answer, answers or [""]) for answer, answers in zip(said, known, strict=True)]
    f1_N = np.array([max(overlap_f1(answer, each) for each in answers) for answer, answers in pairs])
    exact = [any(normalized(answer) == normalized(each) for each in answers) for answer, answers in pairs]
    return bootstrapped("F1", len(f1_N), lambda rows: float(f1_N[rows].mean())), float(np.mean(exact))
