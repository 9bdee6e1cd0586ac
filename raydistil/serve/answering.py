"""What answers beside the student: its teacher, and a new student on trial.

shadow     a share of the requests also goes to the teacher, which answers nobody: how far they agree is counted
cascade    what the student is not sure of the teacher answers
canary     a share of the requests is answered by another student, until it fails or disagrees too often

Where one of them does not answer, the student does: nobody is refused because of what is beside it.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import numpy as np

from raydistil.serve.agreement import agreement
from raydistil.serve.backends import softmax
from raydistil.serve.canary import Tried
from raydistil.serve.model import ServedModel, Timing, shown
from raydistil.serve.schema import Asked, Classified, ClassifyReply, ClassifyRequest, Reply
from raydistil.serve.served import Beside, Cascade, Name

LOG = logging.getLogger(__name__)  # never of a text
MOST_LATER = 64  # comparisons under way, of one replica; what is over is not compared
COMPARED_S = 30.0  # that an answer may take for which nobody waits
SILENT_S = 10.0  # between lines of the log
# Of the time that a request has; the rest is for the student, or for the way back.
CANARYS, TEACHERS = 0.5, 0.9

Answer = tuple[Reply, Timing]
Ask = Callable[[Asked, float], Awaitable[Answer]]


class Answering:
    """Requests to replies, by whom they are to be answered. `asks`: how each of what is beside the student is asked."""

    def __init__(
        self, model: ServedModel, beside: Beside, asks: Mapping[Name, Ask], draw: Callable[[], float] = random.random
    ) -> None:  # fmt: skip
        self._model, self._beside, self._asks, self._draw = model, beside, asks, draw
        self._later = set[asyncio.Task[None]]()
        self._silent_until = 0.0
        self.tried = Tried()
        self.stopped: str | None = None  # why the canary is not asked any more
        model.meter.beside(beside.sources(), beside.cascade.accuracy if beside.cascade else None)

    async def answer(self, request: Asked, within_s: float) -> Answer:
        """Raises ApiError as the student's model does."""
        until, canary = _now() + within_s, self._beside.canary
        if canary is not None and self.stopped is None and self._draw() < canary.share:
            return await self._by_canary(request, until, within_s * CANARYS)
        answered, alone = await self._own(request, until)
        if self._draw() < self._beside.shadow:
            self._compare(self._shadowed(request, alone), "teacher")
        return answered

    async def _own(self, request: Asked, until: float) -> tuple[Answer, Reply]:
        """(the student's with its cascade, and without it)."""
        cascade = self._beside.cascade
        if cascade is not None and isinstance(request, ClassifyRequest):
            return await self._cascaded(cascade, request, until)
        answered = await self._model.reply(request, until - _now())
        return answered, answered[0]

    # ---- canary

    async def _by_canary(self, request: Asked, until: float, within_s: float) -> Answer:
        """Or the student's; what neither can answer says nothing of the canary."""
        answered = await self._ask("canary", request, within_s)
        if answered is None:
            own, _ = await self._own(request, until)
            self.tried += Tried(asked=1, failed=1)
            return own
        self.tried += Tried(asked=1)
        self._compare(self._tried(request, answered[0]), "canary")
        return answered

    async def _tried(self, request: Asked, reply: Reply) -> None:
        own, _ = await self._model.reply(request, COMPARED_S)
        shares = self._agreed("canary", own, reply)
        self.tried += Tried(texts=len(shares), agreed=sum(shares))

    # ---- shadow

    async def _shadowed(self, request: Asked, reply: Reply) -> None:
        answered = await self._ask("teacher", request, COMPARED_S)
        if answered is not None:
            self._agreed("teacher", reply, answered[0])

    # ---- cascade

    async def _cascaded(self, cascade: Cascade, request: ClassifyRequest, until: float) -> tuple[Answer, Reply]:
        raw = request.model_copy(update={"raw": True, "top_k": None})
        reply, timing = await self._model.classify(raw, until - _now())
        sure = [confidence(each, cascade.temperature) for each in reply.results]
        results = list(reply.results)
        doubtful = [n for n, each in enumerate(sure) if each < cascade.threshold]
        for n, each in zip(doubtful, await self._teachers(raw, doubtful, until), strict=False):
            results[n] = each.model_copy(update={"escalated": True})
        self._model.meter.cascaded([(share, each.escalated) for share, each in zip(sure, results, strict=True)])
        shares = ClassifyReply(model=reply.model, results=[shown(each, request) for each in results])
        return (shares, timing), reply

    async def _teachers(self, raw: ClassifyRequest, doubtful: list[int], until: float) -> list[Classified]:
        """Of these inputs; none where it does not answer."""
        if not doubtful:
            return []
        asked = raw.model_copy(update={"inputs": [raw.inputs[n] for n in doubtful]})
        answered = await self._ask("teacher", asked, TEACHERS * (until - _now()))
        return answered[0].results if answered is not None and isinstance(answered[0], ClassifyReply) else []

    # ---- all of them

    async def _ask(self, name: Name, request: Asked, within_s: float) -> Answer | None:
        """None where it does not answer in time, or cannot."""
        try:
            answered = await asyncio.wait_for(_awaited(self._asks[name](request, within_s)), within_s)
        except Exception as error:
            self._tell(name, error)
            answered = None
        self._model.meter.asked(name, "failed" if answered is None else "answered")
        return answered

    def _agreed(self, name: Name, own: Reply, theirs: Reply) -> list[float]:
        shares = agreement(own, theirs)
        self._model.meter.agreed(name, shares)
        return shares

    def _compare(self, work: Coroutine[Any, Any, None], name: Name) -> None:
        """When nobody waits for it; left out where there is too much of it already."""
        if len(self._later) >= MOST_LATER:
            work.close()
            self._model.meter.asked(name, "skipped")
            return
        task = asyncio.create_task(self._unheard(work, name))
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    async def _unheard(self, work: Coroutine[Any, Any, None], name: Name) -> None:
        try:
            await work
        except Exception as error:
            self._tell(name, error)
            self._model.meter.asked(name, "skipped")

    def _tell(self, name: Name, error: Exception) -> None:
        """The log, now and then: how often it happens the metrics say."""
        if _now() >= self._silent_until:
            self._silent_until = _now() + SILENT_S
            LOG.warning("no answer of the %s: %s", name, str(error).strip().rpartition("\n")[2] or repr(error))


def confidence(raw: Classified, temperature: float) -> float:
    """How likely the best label is, of a reply in logits."""
    logits_C = np.array([each.score for each in raw.scores], np.float32)
    return float(softmax(logits_C / temperature).max())


async def _awaited(asked: Awaitable[Answer]) -> Answer:
    return await asked


def _now() -> float:
    return asyncio.get_running_loop().time()
