"""The student in memory: requests in, replies out, by way of one batcher. Knows nothing of HTTP but what it refuses.

L tokens of a row, D hidden size, C classes, M masks of a text, K candidates kept, V vocabulary.
"""

import asyncio
import base64
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from raydistil.errors import ModelError
from raydistil.models import load_tokenizer, num_parameters, outline, shape_of
from raydistil.prepare import num_positions
from raydistil.serve.backends import Backend, Best, Result, Row, softmax
from raydistil.serve.batcher import Batcher, Done, Item, ItemFailed, NotServed
from raydistil.serve.choice import Choosing, Chosen, choose
from raydistil.serve.errors import ApiError, unserved
from raydistil.serve.found import answers_of, entities_of
from raydistil.serve.metrics import Meter
from raydistil.serve.schema import (
    MAX_MASKS,
    MAX_WINDOWS,
    AnswerReply,
    AnswerRequest,
    Asked,
    Candidate,
    Classified,
    ClassifyReply,
    ClassifyRequest,
    Embedding,
    EmbeddingsReply,
    EmbeddingsRequest,
    Filled,
    FilledMask,
    FillMaskReply,
    FillMaskRequest,
    Info,
    LabelScore,
    Reply,
    Scored,
    ScoreReply,
    ScoreRequest,
    Source,
    Tagged,
    TokensReply,
    TokensRequest,
    Usage,
)
from raydistil.serve.served import ONE, Hardware
from raydistil.serve.texts import Encoded, Given, Reader, Truncate
from raydistil.serve.waiting import Limits
from raydistil.types import has_classes

LOG = logging.getLogger(__name__)  # never of a text
LIMITS = Limits(batch_tokens=1024, queue_tokens=1 << 16, age_s=0.5)
READ_AT_ONCE = 2048  # characters: half a millisecond of the loop at most; few take less than handing them to a thread
SAID_AT_ONCE = 512  # tokens, candidates or scores of a reply, for the same reason
MASK_TOKENS = 16  # that a mask counts for: it costs a row of logits over the vocabulary
WINDOW = 384  # tokens of a question with a part of its context, at most
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of a request went."""

    read_s: float
    queued_s: float  # the longest of its items, as are the others
    ran_s: float
    tokens: int

    def headers(self) -> dict[str, str]:
        """In milliseconds, under the names that TEI gave them."""
        times = {f"x-{name}-time": f"{ms:.1f}" for name, ms in self._phases_ms().items()}
        return times | {"x-compute-tokens": str(self.tokens)}

    def attributes(self) -> dict[str, float]:
        """The same for the span of a request that is traced."""
        times = {f"raydistil.{name}_ms": ms for name, ms in self._phases_ms().items()}
        return times | {"raydistil.tokens": self.tokens}

    def _phases_ms(self) -> dict[str, float]:
        return {"tokenization": 1000 * self.read_s, "queue": 1000 * self.queued_s, "inference": 1000 * self.ran_s}


class ServedModel:
    """Raises ApiError for inputs it cannot take, and for what it cannot start on `within_s` of its arrival."""

    def __init__(
        self, source: Source, tokenizer: PreTrainedTokenizerBase, chosen: Chosen, replica: str = "0"
    ) -> None:  # fmt: skip
        """Raises ModelError where model and tokenizer do not go together."""
        shape = shape_of(source.directory, "student")
        self.source, self._chosen, self.meter = source, chosen, Meter(replica)
        self.max_length = int(min(tokenizer.model_max_length, num_positions(shape) or tokenizer.model_max_length))
        self.labels = [shape.id2label[n] for n in range(len(shape.id2label))] if has_classes(source.task) else None
        self._tokenizer: Any = tokenizer
        self.reader = Reader(tokenizer, self.max_length)
        self._parameters = num_parameters(outline(source.directory, source.task))
        self._mask_id = _mask_id(tokenizer) if source.task == "mlm" else -1
        decode: Callable[..., str] = tokenizer.backend_tokenizer.decode
        self._word = lru_cache(maxsize=None)(lambda n: decode([n], skip_special_tokens=False))  # of the vocabulary
        self.batcher: Batcher[Row, Result | Best] = Batcher(
            self._run, LIMITS, padded=False, seen=self.meter.batch
        )  # fmt: skip
        if len(tokenizer) > shape.vocab_size:
            raise ModelError(f"expected at most {shape.vocab_size} tokens, the tokenizer has {len(tokenizer)}")

    @property
    def backend(self) -> Backend:
        return self._chosen.backend

    def info(self) -> Info:
        mask = self._tokenizer.mask_token if self.source.task == "mlm" else None
        return Info(
            model=self.source.name, version=self.source.version, task=self.source.task,
            labels=self.labels, mask_token=mask,
            backend=self.backend.name, texts_s=self._chosen.rows_s,
            parameters=self._parameters, max_length=self.max_length, report=self.source.report,
        )  # fmt: skip

    # ---- by task

    async def reply(self, request: Asked, within_s: float) -> tuple[Reply, Timing]:
        """To a request for the model's task."""
        match request:
            case ClassifyRequest():
                return await self.classify(request, within_s)
            case ScoreRequest():
                return await self.score(request, within_s)
            case TokensRequest():
                return await self.tag(request, within_s)
            case AnswerRequest():
                return await self.answer(request, within_s)
            case EmbeddingsRequest():
                return await self.embed(request, within_s)
            case FillMaskRequest():
                return await self.fill_mask(request, within_s)

    async def classify(self, request: ClassifyRequest, within_s: float) -> tuple[ClassifyReply, Timing]:
        encoded, results, timing = await self._texts(request.given(), request.truncate, within_s)
        assert self.labels is not None
        labels = self.labels
        found = await _made(
            len(encoded) * len(labels),
            lambda: [shown(_scored(*each, labels), request) for each in zip(encoded, results, strict=True)],
        )
        return ClassifyReply(model=self.source.name, results=found), timing

    async def score(self, request: ScoreRequest, within_s: float) -> tuple[ScoreReply, Timing]:
        encoded, results, timing = await self._texts(request.given(), request.truncate, within_s)
        found = [
            Scored(score=float(number_1[0]), tokens=each.tokens, truncated=each.is_cut)
            for each, number_1 in zip(encoded, results, strict=True)
        ]
        return ScoreReply(model=self.source.name, results=found), timing

    async def tag(self, request: TokensRequest, within_s: float) -> tuple[TokensReply, Timing]:
        encoded, results, timing = await self._texts(request.inputs, request.truncate, within_s)
        assert self.labels is not None
        labels = self.labels
        found = await _made(
            timing.tokens,
            lambda: [_tagged(*each, labels) for each in zip(request.inputs, encoded, results, strict=True)],
        )
        return TokensReply(model=self.source.name, results=found), timing

    async def embed(self, request: EmbeddingsRequest, within_s: float) -> tuple[EmbeddingsReply, Timing]:
        encoded, results, timing = await self._texts(request.input, request.truncate, within_s, "input")
        coded = request.encoding_format == "base64"
        data = [
            Embedding(index=n, embedding=base64.b64encode(vector_D.tobytes()).decode() if coded else vector_D.tolist())
            for n, vector_D in enumerate(results)
        ]
        usage = Usage(prompt_tokens=timing.tokens, total_tokens=timing.tokens)
        cut = [each.is_cut for each in encoded]
        return EmbeddingsReply(data=data, model=self.source.name, usage=usage, truncated=cut), timing

    async def answer(self, request: AnswerRequest, within_s: float) -> tuple[AnswerReply, Timing]:
        length, started = min(WINDOW, self.max_length), _now()
        encoded = await asyncio.to_thread(
            self.reader.questions, request.question, request.context, length, MAX_WINDOWS + 1
        )  # fmt: skip
        if len(encoded) > MAX_WINDOWS:
            message = f"expected a context of at most {MAX_WINDOWS} windows of {length} tokens, got more"
            raise ApiError(413, "too_long", message, "context", MAX_WINDOWS)
        asked = [Row(each.ids, each.context) for each in encoded]
        results, timing = await self._asked(asked, started + within_s, started, "windows")
        found, lacking = await _made(
            timing.tokens, lambda: answers_of(request.context, encoded, results, request.top_k)
        )  # fmt: skip
        reply = AnswerReply(
            model=self.source.name, answers=found, lacking=lacking, windows=len(encoded), tokens=timing.tokens,
            truncated=encoded[0].is_cut,
        )  # fmt: skip
        return reply, timing

    async def fill_mask(self, request: FillMaskRequest, within_s: float) -> tuple[FillMaskReply, Timing]:
        encoded, started = await self._read(request.inputs, request.truncate)
        places = [np.flatnonzero(each.ids == self._mask_id) for each in encoded]
        self._check_masks(encoded, [len(each) for each in places])
        asked = [Row(each.ids, places=at, best=request.top_k) for each, at in zip(encoded, places, strict=True)]
        results, timing = await self._asked(asked, started + within_s, started, "inputs")
        found = await _made(
            sum(map(len, places)) * request.top_k,
            lambda: [
                Filled(masks=self._filled(best), tokens=each.tokens, truncated=each.is_cut)
                for each, best in zip(encoded, results, strict=True)
            ],
        )
        return FillMaskReply(model=self.source.name, results=found), timing

    # ---- reading, asking

    async def _texts(
        self, texts: Sequence[Given], truncate: Truncate, within_s: float, field: str = "inputs"
    ) -> tuple[list[Encoded], list[Any], Timing]:  # fmt: skip
        encoded, started = await self._read(texts, truncate, field)
        results, timing = await self._asked(
            [Row(each.ids, each.context) for each in encoded], started + within_s, started, field
        )  # fmt: skip
        return encoded, results, timing

    async def _read(
        self, texts: Sequence[Given], truncate: Truncate, field: str = "inputs"
    ) -> tuple[list[Encoded], float]:  # fmt: skip
        """(rows, when it was begun). Raises ApiError for a text that is too long to be taken whole."""
        started = _now()
        short = sum(map(_characters, texts)) <= READ_AT_ONCE
        encoded = self.reader.inputs(texts, truncate) if short else await asyncio.to_thread(
            self.reader.inputs, texts, truncate
        )  # fmt: skip
        self.meter.cut(sum(each.is_cut for each in encoded))
        for row, each in enumerate(encoded):
            if each.is_cut and truncate == "error":
                more = "more than " if each.unread else ""
                message = f"expected at most {self.max_length} tokens, got {more}{each.tokens + len(each.cut_ids)}"
                raise ApiError(422, "too_long", message, f"{field}[{row}]", self.max_length)
        return encoded, started

    async def _asked(
        self, asked: Sequence[Row], deadline: float, started: float, field: str
    ) -> tuple[list[Any], Timing]:  # fmt: skip
        read_s = _now() - started
        try:
            done: list[Done[Any]] = await self.batcher.submit([Item(_cost(each), each) for each in asked], deadline)
        except NotServed as error:
            if isinstance(error, ItemFailed):
                LOG.error("the model failed at one of %d inputs", len(asked), exc_info=error.__cause__)
            raise unserved(error, field) from error
        tokens = sum(len(each.ids) for each in asked)
        timing = Timing(read_s, max(each.queued_s for each in done), max(each.ran_s for each in done), tokens)
        self.meter.phases(timing.read_s, timing.queued_s, timing.ran_s)
        return [each.result for each in done], timing

    def _run(self, items: list[Item[Row]]) -> list[Result | Best]:
        """On the batcher's thread."""
        return self.backend.run([item.payload for item in items])

    def _filled(self, best: Best) -> list[FilledMask]:
        return [
            FilledMask(
                candidates=[
                    Candidate(token=self._word(n), score=score)
                    for score, n in zip(scores_K.tolist(), ids_K.tolist(), strict=True)
                ]
            )
            for scores_K, ids_K in zip(best.scores_MK, best.ids_MK, strict=True)
        ]

    def _check_masks(self, encoded: list[Encoded], counts: list[int]) -> None:
        """Every input has a mask, none was cut off, and there are not too many."""
        for row, (each, count) in enumerate(zip(encoded, counts, strict=True)):
            if self._mask_id in each.cut_ids or self._tokenizer.mask_token in each.unread:
                message = f"expected every mask within {self.max_length} tokens, some lie beyond: shorten the text"
                raise ApiError(422, "too_long", message, f"inputs[{row}]", self.max_length)
            if count == 0:
                message = f"expected a text with {self._tokenizer.mask_token} in it, found none"
                raise ApiError(422, "no_mask", message, f"inputs[{row}]")
        if sum(counts) > MAX_MASKS:
            message = f"expected at most {MAX_MASKS} masks in one request, got {sum(counts)}"
            raise ApiError(413, "too_many_masks", message, "inputs", MAX_MASKS)


async def _made(size: int, make: Callable[[], T]) -> T:
    """What `make` gives, of a thread where that takes long: the loop has others to answer."""
    return make() if size <= SAID_AT_ONCE else await asyncio.to_thread(make)


def _scored(each: Encoded, logits_C: Result, labels: list[str]) -> Classified:
    """In logits, of all labels, the best one first."""
    best = np.argsort(-logits_C, kind="stable").tolist()
    scores = [LabelScore(label=labels[n], score=float(logits_C[n])) for n in best]
    return Classified(
        label=scores[0].label, score=scores[0].score, scores=scores, tokens=each.tokens, truncated=each.is_cut
    )


def _tagged(text: str, each: Encoded, logits_LC: Result, labels: list[str]) -> Tagged:
    entities = entities_of(text, each, softmax(logits_LC), labels)
    return Tagged(entities=entities, tokens=each.tokens, truncated=each.is_cut)


def shown(raw: Classified, request: ClassifyRequest) -> Classified:
    """As `request` has it, of all labels' logits."""
    logits_C = np.array([each.score for each in raw.scores], np.float32)
    scores_C = (logits_C if request.raw else softmax(logits_C)).tolist()
    scores = [
        LabelScore(label=each.label, score=score) for each, score in zip(raw.scores, scores_C, strict=True)
    ][: request.top_k]  # fmt: skip
    return raw.model_copy(update={"score": scores[0].score, "scores": scores})


def load(source: Source, hardware: Hardware = ONE, replica: str = "0", choosing: Choosing = choose) -> ServedModel:
    """The model, warm, on the fastest of its backends; `choosing`: in this process, or in one of its own (`apart`).

    Raises ModelError where it cannot be loaded, does not go with its tokenizer, or lacks the backend asked for.
    """
    tokenizer = load_tokenizer(source.directory)
    labels = tuple(shape_of(source.directory, "student").id2label.values()) if has_classes(source.task) else ()
    chosen = choosing(source.directory, source.task, labels, hardware, source.backend)
    return ServedModel(source, tokenizer, chosen, replica)


def _characters(given: Given) -> int:
    return len(given) if isinstance(given, str) else sum(map(len, given))


def _cost(row: Row) -> int:
    return len(row.ids) + MASK_TOKENS * (0 if row.places is None else len(row.places))


def _mask_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.mask_token_id is None:
        raise ModelError("expected a tokenizer with a mask token, this one has none")
    return int(tokenizer.mask_token_id)


def _now() -> float:
    return asyncio.get_running_loop().time()
