"""What is beside a student: a canary, its teacher unheard, and its teacher for what the student is not sure of."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file

from raydistil.serve.answering import MOST_LATER, Answering, Ask
from raydistil.serve.canary import Limits, Tried
from raydistil.serve.errors import ApiError
from raydistil.serve.metrics import Board, Meter, exposition
from raydistil.serve.model import ServedModel, load
from raydistil.serve.schema import Asked, ClassifyReply, ClassifyRequest
from raydistil.serve.served import Beside, Canary, Cascade, Name
from raydistil.serve.source import find

TEXTS = ["ba ca da", "ga hu", "de fe ge he", "bo"]
REQUEST = ClassifyRequest(inputs=TEXTS)


def decided(folder: Path, seed: int) -> ServedModel:
    """Random weights, but no label is better than the others for all texts."""
    path = tiny.write_model(folder, "classification", seed=seed)
    raw, _ = asyncio.run(load(find(path)).classify(ClassifyRequest(inputs=TEXTS, raw=True), 10.0))
    means = [
        np.mean([score.score for each in raw.results for score in each.scores if score.label == label])
        for label in tiny.LABELS
    ]
    weights = load_file(path / "model.safetensors")
    head = {"classifier.weight": 40 * weights["classifier.weight"]}
    head["classifier.bias"] = 40 * (weights["classifier.bias"] - torch.tensor(means, dtype=torch.float32))
    save_file({**weights, **head}, path / "model.safetensors")
    return load(find(path))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return decided(tmp_path_factory.mktemp("beside") / "own", 0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return decided(tmp_path_factory.mktemp("beside") / "other", 1)


@pytest.fixture
def own(student: ServedModel) -> ServedModel:
    """With counts of its own."""
    student.meter = Meter("0")
    return student


async def broken(request: Asked, within_s: float) -> Any:
    raise RuntimeError("500 the model failed")


async def silent(request: Asked, within_s: float) -> Any:
    await asyncio.sleep(60)


def answering(own: ServedModel, beside: Beside, draw: Callable[[], float] = lambda: 0.0, **asks: Ask) -> Answering:
    named: dict[Name, Ask] = {name: ask for name, ask in asks.items() if name in ("teacher", "canary")}  # type: ignore[misc]
    return Answering(own, beside, named, draw)


def canary(own: ServedModel, share: float = 0.5) -> Beside:
    return Beside(canary=Canary(own.source, share, Limits(0.01, 0.1)))


def shadow(own: ServedModel, share: float = 1.0) -> Beside:
    return Beside(teacher=own.source, shadow=share)


def counts(own: ServedModel) -> dict[tuple[str, ...], float]:
    """Of what is beside it, by name and labels."""
    families = text_string_to_metric_families(exposition([own.meter.families(own.batcher.load())]).decode())
    return {
        (sample.name.removeprefix("raydistil_"), *(text for name, text in sample.labels.items() if name != "replica")):
        sample.value
        for family in families for sample in family.samples
    }  # fmt: skip


def ask(to: Answering, request: Asked = REQUEST, within_s: float = 10.0) -> Any:
    """The reply, when all that nobody waits for is done."""

    async def asked() -> Any:
        reply, _ = await to.answer(request, within_s)
        await asyncio.gather(*to._later)
        return reply

    return asyncio.run(asked())


def labels(reply: ClassifyReply) -> list[str]:
    return [each.label for each in reply.results]


def test_a_share_is_the_canarys_and_is_compared(own: ServedModel, other: ServedModel) -> None:
    draws = iter([0.4, 0.6, 1.0])
    to = answering(own, canary(own), lambda: next(draws), canary=other.reply)
    first, second = ask(to), ask(to)
    assert first.model == "other" and second.model == "own"
    same = sum(a == b for a, b in zip(labels(first), labels(second), strict=True))
    assert 0 < same < len(TEXTS)  # or nothing here could tell
    assert to.tried == Tried(1, 0, len(TEXTS), same)
    found = counts(own)
    assert found["beside_total", "canary", "answered"] == 1
    assert (found["compared_total", "canary"], found["agreement_total", "canary"]) == (len(TEXTS), same)


@pytest.mark.parametrize("ill", [broken, silent])
def test_where_the_canary_does_not_answer_the_student_does(own: ServedModel, ill: Ask) -> None:
    to = answering(own, canary(own), canary=ill)
    assert ask(to, within_s=1.0).model == "own"
    assert to.tried == Tried(1, 1, 0, 0.0)
    assert counts(own)["beside_total", "canary", "failed"] == 1


def test_what_the_student_refuses_too_says_nothing_of_the_canary(own: ServedModel) -> None:
    to = answering(own, canary(own), canary=broken)
    with pytest.raises(ApiError, match="expected at most 32 tokens"):
        ask(to, ClassifyRequest(inputs=["ba " * 100], truncate="error"))
    assert to.tried == Tried()


def test_a_canary_that_has_to_go_is_asked_no_more(own: ServedModel) -> None:
    board, to = Board(), answering(own, canary(own), canary=broken)
    for _ in range(3):
        assert to.stopped is None
        ask(to)
        to.stopped = board.tried("v", Limits(0.01, 0.1), "here", to.tried)
    assert to.stopped == board.verdict("v") == "3 of 3 requests failed, at most 1.0% may"
    ask(to)
    assert to.tried.asked == 3
    assert board.tried("v", Limits(0.01, 0.1), "there", Tried()) == to.stopped  # others hear of it
    assert board.tried("other", Limits(0.01, 0.1), "there", Tried(3, 0)) is None and board.verdict("other") is None
    another = Board()  # in the place of one that died, and with it what it had been told
    assert another.tried("v", Limits(0.01, 0.1), "there", Tried()) is None
    assert another.tried("v", Limits(0.01, 0.1), "here", Tried(), to.stopped) == another.verdict("v") == to.stopped


def test_the_teacher_in_the_shadow_answers_nobody(own: ServedModel, other: ServedModel) -> None:
    to = answering(own, shadow(own), teacher=other.reply)
    plain = asyncio.run(own.reply(REQUEST, 10.0))[0]
    assert ask(to) == plain
    same = sum(a == b for a, b in zip(labels(plain), labels(asyncio.run(other.reply(REQUEST, 10.0))[0]), strict=True))
    found = counts(own)
    assert (found["compared_total", "teacher"], found["agreement_total", "teacher"]) == (len(TEXTS), same)


def test_a_teacher_that_fails_in_the_shadow_is_counted_and_not_compared(own: ServedModel) -> None:
    to = answering(own, shadow(own), teacher=broken)
    assert ask(to).model == "own"
    found = counts(own)
    assert (found["beside_total", "teacher", "failed"], found["compared_total", "teacher"]) == (1, 0)


def test_series_are_there_from_the_start(own: ServedModel) -> None:
    answering(own, shadow(own))
    found = counts(own)
    assert [found["beside_total", "teacher", outcome] for outcome in ("answered", "failed", "skipped")] == [0, 0, 0]


def test_what_is_too_much_to_compare_is_left_out(own: ServedModel) -> None:
    to = answering(own, shadow(own), teacher=silent)

    async def many() -> None:
        for _ in range(MOST_LATER + 3):
            await to.answer(REQUEST, 10.0)
        assert len(to._later) == MOST_LATER

    asyncio.run(many())
    assert counts(own)["beside_total", "teacher", "skipped"] == 3


def cascade(threshold: float) -> Cascade:
    return Cascade(threshold, 2.0, 0.5, 0.9, 0.85)


def test_what_the_student_is_not_sure_of_is_the_teachers(own: ServedModel, other: ServedModel) -> None:
    own_plain, other_plain = (asyncio.run(each.reply(REQUEST, 10.0))[0] for each in (own, other))
    sure = sorted(_confidences(own))
    between = (sure[1] + sure[2]) / 2
    to = answering(own, Beside(teacher=other.source, cascade=cascade(between)), lambda: 1.0, teacher=other.reply)
    reply = ask(to)
    assert [each.escalated for each in reply.results] == [each < between for each in _confidences(own)]
    for found, ours, theirs in zip(reply.results, own_plain.results, other_plain.results, strict=True):
        wanted = theirs if found.escalated else ours
        assert found.label == wanted.label and found.score == pytest.approx(wanted.score, abs=1e-6)
    found = counts(own)
    assert (found["cascaded_total", "student"], found["cascaded_total", "teacher"]) == (2, 2)
    assert found["confidence_total", "teacher"] == pytest.approx(sum(sure[:2]))
    assert found["cascade_accuracy",] == 0.9


def test_the_shadow_of_a_cascade_is_compared_with_the_student_alone(own: ServedModel, other: ServedModel) -> None:
    ours, theirs = (labels(asyncio.run(each.reply(REQUEST, 10.0))[0]) for each in (own, other))
    beside = Beside(teacher=other.source, shadow=1.0, cascade=cascade(1.1))
    reply = ask(answering(own, beside, lambda: 0.0, teacher=other.reply))
    assert labels(reply) == theirs != ours
    assert counts(own)["agreement_total", "teacher"] == sum(a == b for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("raw", "top_k"), [(False, 1), (True, None), (True, 2), (False, 9)])
def test_a_cascade_answers_in_the_form_that_was_asked_for(
    own: ServedModel, other: ServedModel, raw: bool, top_k: int | None
) -> None:
    request = ClassifyRequest(inputs=TEXTS, raw=raw, top_k=top_k)
    to = answering(own, Beside(teacher=other.source, cascade=cascade(2.0)), lambda: 1.0, teacher=other.reply)
    reply, wanted = ask(to, request), asyncio.run(other.reply(request, 10.0))[0]
    assert all(each.escalated for each in reply.results)
    for found, theirs in zip(reply.results, wanted.results, strict=True):
        assert [each.label for each in found.scores] == [each.label for each in theirs.scores]
        assert [each.score for each in found.scores] == pytest.approx([each.score for each in theirs.scores], abs=1e-6)


@pytest.mark.parametrize("ill", [broken, silent])
def test_where_the_teacher_does_not_answer_the_student_has(own: ServedModel, ill: Ask) -> None:
    to = answering(own, Beside(teacher=own.source, cascade=cascade(2.0)), lambda: 1.0, teacher=ill)
    reply = ask(to, within_s=1.0)
    assert reply == asyncio.run(own.reply(REQUEST, 10.0))[0]
    assert counts(own)["cascaded_total", "teacher"] == 0


def test_what_the_student_cannot_take_is_refused_as_without_anybody_beside(own: ServedModel) -> None:
    long = ClassifyRequest(inputs=["ba " * 100], truncate="error")
    to = answering(own, Beside(teacher=own.source, cascade=cascade(2.0)), lambda: 1.0, teacher=own.reply)
    with pytest.raises(ApiError, match="expected at most 32 tokens"):
        ask(to, long)


def _confidences(model: ServedModel) -> list[float]:
    from raydistil.serve.answering import confidence

    raw = asyncio.run(model.classify(ClassifyRequest(inputs=TEXTS, raw=True), 10.0))[0]
    return [confidence(each, 2.0) for each in raw.results]
