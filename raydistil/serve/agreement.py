"""How far two models say the same of a text, from 0 to 1."""

import base64
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from raydistil.scores.answers import overlap_f1
from raydistil.serve.schema import (
    AnswerReply,
    ClassifyReply,
    EmbeddingsReply,
    Filled,
    FillMaskReply,
    Reply,
    Tagged,
    TokensReply,
)


def agreement(one: Reply, other: Reply) -> list[float]:
    """Of each text of a request that both answered. Classification: whether the label is the same. Entities: F1 of
    those that both found, by place and label. Answers: F1 of the words of the best ones. Masks: the share whose first
    candidate is the same. Vectors: their cosine, or 0 where that is less, or one is longer than the other.
    """
    match one, other:
        case ClassifyReply(), ClassifyReply():
            return [float(a.label == b.label) for a, b in zip(one.results, other.results, strict=True)]
        case TokensReply(), TokensReply():
            return [_entities_f1(a, b) for a, b in zip(one.results, other.results, strict=True)]
        case FillMaskReply(), FillMaskReply():
            return [_same_words(a, b) for a, b in zip(one.results, other.results, strict=True)]
        case AnswerReply(), AnswerReply():
            return [overlap_f1(_best(one), _best(other))]
        case EmbeddingsReply(), EmbeddingsReply():
            vectors = zip(_vectors(one), _vectors(other), strict=True)
            return [max(0.0, float(a_D @ b_D)) if a_D.shape == b_D.shape else 0.0 for a_D, b_D in vectors]
    raise AssertionError(f"replies to one request, got {type(one).__name__} and {type(other).__name__}")


def _entities_f1(one: Tagged, other: Tagged) -> float:
    """1 where neither found any."""
    found, also = (Counter((each.start, each.end, each.label) for each in tagged.entities) for tagged in (one, other))
    return 2 * (found & also).total() / (found.total() + also.total()) if found or also else 1.0


def _same_words(one: Filled, other: Filled) -> float:
    pairs = zip(one.masks, other.masks, strict=True)
    return float(np.mean([a.candidates[0].token == b.candidates[0].token for a, b in pairs]))


def _best(reply: AnswerReply) -> str:
    return reply.answers[0].text if reply.answers else ""


def _vectors(reply: EmbeddingsReply) -> list[NDArray[np.float32]]:
    return [
        np.frombuffer(base64.b64decode(each.embedding), "<f4")
        if isinstance(each.embedding, str)
        else np.array(each.embedding, np.float32)
        for each in reply.data
    ]
