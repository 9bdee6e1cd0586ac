"""How far two replies to one request agree, and when a canary has disagreed or failed too often for chance."""

import base64
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from raydistil.serve.agreement import agreement
from raydistil.serve.canary import Limits, Tried, verdict
from raydistil.serve.schema import (
    Answer,
    AnswerReply,
    Candidate,
    Classified,
    ClassifyReply,
    Embedding,
    EmbeddingsReply,
    Entity,
    Filled,
    FilledMask,
    FillMaskReply,
    Tagged,
    TokensReply,
    Usage,
)

LIMITS = Limits(errors=0.01, disagreement=0.1)


def classes(*labels: str) -> ClassifyReply:
    found = [Classified(label=label, score=1, scores=[], tokens=3, truncated=False) for label in labels]
    return ClassifyReply(model="m", results=found)


def entities(*texts: Sequence[tuple[int, int, str]]) -> TokensReply:
    found = [
        Tagged(
            entities=[Entity(label=label, score=1, start=start, end=end, text="") for start, end, label in spans],
            tokens=3, truncated=False,
        )
        for spans in texts
    ]  # fmt: skip
    return TokensReply(model="m", results=found)


def filled(*words: str) -> FillMaskReply:
    masks = [FilledMask(candidates=[Candidate(token=word, score=1), Candidate(token="x", score=0)]) for word in words]
    return FillMaskReply(model="m", results=[Filled(masks=masks, tokens=3, truncated=False)])


def answers(*texts: str) -> AnswerReply:
    found = [Answer(text=text, score=1, start=0, end=1) for text in texts]
    return AnswerReply(model="m", answers=found, lacking=0, windows=1, tokens=3, truncated=False)


def vectors(*vectors: Sequence[float], coded: bool = False) -> EmbeddingsReply:
    data = [
        Embedding(
            index=n, embedding=base64.b64encode(np.array(each, "<f4").tobytes()).decode() if coded else list(each)
        )
        for n, each in enumerate(vectors)
    ]
    usage = Usage(prompt_tokens=1, total_tokens=1)
    return EmbeddingsReply(data=data, model="m", usage=usage, truncated=[False] * len(data))


def test_labels_agree_or_not() -> None:
    assert agreement(classes("a", "b", "c"), classes("a", "c", "c")) == [1, 0, 1]


def test_entities_agree_by_place_and_label() -> None:
    one = entities([(0, 3, "PER"), (5, 8, "LOC")], [], [(0, 2, "PER")], [])
    other = entities([(0, 3, "PER"), (5, 8, "ORG"), (9, 12, "LOC")], [], [], [(1, 2, "LOC")])
    assert agreement(one, other) == [2 * 1 / 5, 1, 0, 0]


def test_masks_agree_by_their_first_candidates() -> None:
    assert agreement(filled("red", "blue"), filled("red", "green")) == [0.5]


def test_answers_agree_by_their_words() -> None:
    assert agreement(answers("in London", "Paris"), answers("London")) == [2 * 1 / 3]
    assert agreement(answers(), answers()) == [1]
    assert agreement(answers("London"), answers()) == [0]


@pytest.mark.parametrize("coded", [False, True])
def test_vectors_agree_by_their_cosine(coded: bool) -> None:
    one = vectors((1, 0), (0.6, 0.8), (1, 0), coded=coded)
    other = vectors((1, 0), (1, 0), (-1, 0))
    np.testing.assert_allclose(agreement(one, other), [1, 0.6, 0], atol=1e-6)
    assert agreement(vectors((1, 0), coded=coded), vectors((1, 0, 0))) == [0]


def test_a_few_failures_may_be_chance_and_many_are_none() -> None:
    assert verdict(Tried(), LIMITS) is None
    assert verdict(Tried(asked=3, failed=1), LIMITS) is None
    assert verdict(Tried(asked=1, failed=1), LIMITS) is None
    assert verdict(Tried(asked=1, failed=1), Limits(0.0, 0.1)) is not None
    assert verdict(Tried(asked=1000, failed=12), LIMITS) is None  # 1.2 %
    said = verdict(Tried(asked=1000, failed=40), LIMITS)
    assert said == "40 of 1000 requests failed, at most 1.0% may"
    assert verdict(Tried(asked=4, failed=4), LIMITS) is not None


def test_disagreement_is_of_the_texts_that_both_answered() -> None:
    assert verdict(Tried(asked=500, texts=500, agreed=450), LIMITS) is None
    assert verdict(Tried(asked=500, texts=500, agreed=500), LIMITS) is None
    said = verdict(Tried(asked=500, texts=400, agreed=300), LIMITS)
    assert said == "it disagreed on 25.0% of 400 texts, at most 10.0% may be"
    assert verdict(Tried(asked=500, texts=400, agreed=300), Limits(0.01, 1.0)) is None


@given(some.integers(1, 10_000), some.floats(0, 1))
def test_who_keeps_the_limits_is_never_sent_away(asked: int, share: float) -> None:
    tried = Tried(asked, int(asked * share * LIMITS.errors), asked, asked * (1 - share * LIMITS.disagreement))
    assert verdict(tried, LIMITS) is None


def test_what_replicas_saw_adds_up() -> None:
    assert sum([Tried(1, 1, 0, 0.0), Tried(2, 0, 3, 2.5)], Tried()) == Tried(3, 1, 3, 2.5)
