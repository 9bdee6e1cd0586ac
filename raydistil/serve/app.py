"""The student in memory and its HTTP interface. Knows nothing of Ray: Serve wraps what `build_api` returns.

B inputs of a request, L padded length, D hidden size, C classes, N masks of a request, V vocabulary.
"""

import asyncio
import threading
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raydistil.errors import ModelError
from raydistil.models import load_model, load_tokenizer, num_parameters, vocabulary_head
from raydistil.serve.schema import (
    MAX_BODY_BYTES,
    MAX_MASKS,
    ROUTES,
    Candidate,
    Classified,
    ClassifyReply,
    ClassifyRequest,
    ErrorDetail,
    ErrorReply,
    ErrorType,
    Filled,
    FilledMask,
    FillMaskReply,
    FillMaskRequest,
    Health,
    Info,
    LabelScore,
    Source,
    TextRequest,
)


class ApiError(HTTPException):
    """An answer other than 2xx. FastAPI lets an HTTPException pass where it would wrap any other."""

    def __init__(
        self, status: int, type_: ErrorType, message: str, param: str | None = None, limit: int | None = None
    ) -> None:
        super().__init__(status, message)
        self.error = ErrorDetail(type=type_, message=message, param=param, limit=limit)


# ---- the model


@dataclass(frozen=True, slots=True)
class Encoded:
    """The inputs of one request, cut to what the model takes and padded to the longest."""

    ids_BL: Tensor
    mask_BL: Tensor
    tokens: list[int]  # of each input, special ones included
    cut_ids: list[list[int]]  # of each input: what did not fit


class ServedModel:
    """Texts in, replies out; safe to call from several threads. Raises ApiError for inputs it cannot take."""

    def __init__(self, source: Source, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ModelError where model and tokenizer do not go together."""
        self.source = source
        self.max_length = _longest(model, tokenizer)
        self._model: Any = model
        self._model.eval()
        self._tokenizer: Any = tokenizer
        self._tokenizer.truncation_side = self._tokenizer.padding_side = "right"
        # One request at a time: more would share the one CPU, and each hold activations of its own.
        self._busy = threading.Lock()
        if source.task == "mlm":
            self._head = vocabulary_head(model)
            self._mask_id = _mask_id(tokenizer)
        if len(tokenizer) > model.config.vocab_size:
            raise ModelError(f"expected at most {model.config.vocab_size} tokens, the tokenizer has {len(tokenizer)}")

    def info(self) -> Info:
        classify = self.source.task == "classification"
        return Info(
            model=self.source.name, task=self.source.task, labels=self._labels() if classify else None,
            mask_token=None if classify else self._tokenizer.mask_token, parameters=num_parameters(self._model),
            max_length=self.max_length, report=self.source.report,
        )  # fmt: skip

    def warm_up(self) -> None:
        """The first forward pass, which is slow, and fails where the model does not work at all."""
        if self.source.task == "classification":
            self.classify(ClassifyRequest(inputs=["warm"]))
        else:
            self.fill_mask(FillMaskRequest(inputs=[self._tokenizer.mask_token]))

    def classify(self, request: ClassifyRequest) -> ClassifyReply:
        with self._busy, torch.inference_mode():
            encoded = self._encode(request)
            logits_BC = self._model(input_ids=encoded.ids_BL, attention_mask=encoded.mask_BL).logits
        labels = self._labels()
        results = []
        for row, scores_C in enumerate(logits_BC.float().softmax(-1)):
            best = scores_C.topk(min(request.top_k or len(labels), len(labels)))
            scores = [LabelScore(label=labels[n], score=score) for score, n in _pairs(best)]
            results.append(
                Classified(
                    label=scores[0].label, score=scores[0].score, scores=scores, tokens=encoded.tokens[row],
                    truncated=bool(encoded.cut_ids[row]),
                )
            )  # fmt: skip
        return ClassifyReply(model=self.source.name, results=results)

    def fill_mask(self, request: FillMaskRequest) -> FillMaskReply:
        with self._busy, torch.inference_mode():
            encoded = self._encode(request)
            at_BL = encoded.ids_BL == self._mask_id
            counts = at_BL.sum(-1).tolist()
            self._check_masks(encoded, counts)
            inputs = {"input_ids": encoded.ids_BL, "attention_mask": encoded.mask_BL}
            hidden_ND = self._model.base_model(**inputs).last_hidden_state[at_BL]
            scores_NV = self._head(hidden_ND).float().softmax(-1)
            best = scores_NV.topk(min(request.top_k, scores_NV.shape[-1]))
        masks = iter([self._filled(scores, ids) for scores, ids in zip(*best, strict=True)])
        results = [
            Filled(masks=[next(masks) for _ in range(count)], tokens=tokens, truncated=bool(cut))
            for count, tokens, cut in zip(counts, encoded.tokens, encoded.cut_ids, strict=True)
        ]
        return FillMaskReply(model=self.source.name, results=results)

    def _filled(self, scores_K: Tensor, ids_K: Tensor) -> FilledMask:
        found = zip(scores_K.tolist(), ids_K.tolist(), strict=True)
        return FilledMask(candidates=[Candidate(token=self._tokenizer.decode([n]), score=score) for score, n in found])

    def _check_masks(self, encoded: Encoded, counts: list[int]) -> None:
        """Every input has a mask, none was cut off, and there are not too many."""
        for row, (count, cut) in enumerate(zip(counts, encoded.cut_ids, strict=True)):
            if self._mask_id in cut:
                message = f"expected every mask within {self.max_length} tokens, some lie beyond: shorten the text"
                raise ApiError(422, "too_long", message, f"inputs[{row}]", self.max_length)
            if count == 0:
                message = f"expected a text with {self._tokenizer.mask_token} in it, found none"
                raise ApiError(422, "no_mask", message, f"inputs[{row}]")
        if sum(counts) > MAX_MASKS:
            message = f"expected at most {MAX_MASKS} masks in one request, got {sum(counts)}"
            raise ApiError(413, "too_many_masks", message, "inputs", MAX_MASKS)

    def _encode(self, request: TextRequest) -> Encoded:
        batch = self._tokenizer(
            request.inputs, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        tokens = batch["attention_mask"].sum(-1).tolist()
        cut_ids = [_cut_ids(encoding) for encoding in batch.encodings]
        for row, cut in enumerate(cut_ids):
            if cut and request.truncate == "error":
                message = f"expected at most {self.max_length} tokens, got {tokens[row] + len(cut)}"
                raise ApiError(422, "too_long", message, f"inputs[{row}]", self.max_length)
        return Encoded(batch["input_ids"], batch["attention_mask"], tokens, cut_ids)

    def _labels(self) -> list[str]:
        names = self._model.config.id2label
        return [names[n] for n in range(len(names))]


def load(source: Source) -> ServedModel:
    """The model, warm. Raises ModelError where it cannot be loaded or does not go with its tokenizer."""
    model = ServedModel(source, load_model(source.directory, source.task), load_tokenizer(source.directory))
    model.warm_up()
    return model


def _longest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Most tokens of one input, special ones included."""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    # RoBERTa and MPNet count positions from their padding index + 1, and so have that many fewer.
    reserved = 0 if padding is None else padding + 1
    return int(min(tokenizer.model_max_length, model.config.max_position_embeddings - reserved))


def _mask_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.mask_token_id is None:
        raise ModelError("expected a tokenizer with a mask token, this one has none")
    return int(tokenizer.mask_token_id)


def _cut_ids(encoding: Any) -> list[int]:
    """The ids that did not fit; every overflowing piece has special tokens of its own, which do not count."""
    return [
        token
        for piece in encoding.overflowing
        for token, special in zip(piece.ids, piece.special_tokens_mask, strict=True)
        if not special
    ]


def _pairs(best: Any) -> list[tuple[float, int]]:
    """(score, index) of a `topk` over one row, best first."""
    return list(zip(best.values.tolist(), best.indices.tolist(), strict=True))


# ---- the interface


def build_api(model: ServedModel) -> FastAPI:
    """The routes of `model`'s task, its state, and an answer for every error."""
    app = FastAPI(title=f"raydistil: {model.source.name}", description="A distilled student.")
    app.add_middleware(BodyLimit)
    _add_errors(app)
    _add_state(app, model)
    _add_task(app, model)
    return app


def _add_task(app: FastAPI, model: ServedModel) -> None:
    """The route of the model's task; the other one answers with this one's name."""
    here = ROUTES[model.source.task]
    refusals: dict[int | str, dict[str, Any]] = {code: {"model": ErrorReply} for code in (400, 413, 422)}

    async def classify(request: ClassifyRequest) -> ClassifyReply:
        """Score every label for each text."""
        return await asyncio.to_thread(model.classify, request)

    async def fill_mask(request: FillMaskRequest) -> FillMaskReply:
        """Candidates for every mask token of each text."""
        return await asyncio.to_thread(model.fill_mask, request)

    async def other_task() -> None:
        raise ApiError(404, "wrong_task", f"{model.source.name} was trained for {model.source.task}: use POST {here}")

    app.post(here, responses=refusals)(classify if model.source.task == "classification" else fill_mask)
    for route in set(ROUTES.values()) - {here}:
        app.post(route, include_in_schema=False)(other_task)


def _add_state(app: FastAPI, model: ServedModel) -> None:
    info = model.info()

    @app.get("/livez")
    async def live() -> Health:
        """The process answers."""
        return Health()

    @app.get("/readyz")
    async def ready() -> Health:
        """The model is loaded and warm: before that there is no app to answer."""
        return Health()

    @app.get("/info", name="info")
    async def describe() -> Info:
        """The model, its limits and what was measured of it."""
        return info


class BodyLimit:
    """ASGI middleware: stop reading a body that is longer than MAX_BODY_BYTES."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY_BYTES:
                expected = f"expected a body of at most {MAX_BODY_BYTES} bytes"
                raise ApiError(413, "body_too_large", expected, limit=MAX_BODY_BYTES)
            return message

        await self.app(scope, counted, send)


# ---- errors


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return _reply(error.status_code, error.error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _reply(*_explain(error.errors()[0]))

    @app.exception_handler(StarletteHTTPException)
    async def other(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return _reply(error.status_code, _http_error(request, error), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> JSONResponse:
        return _reply(500, ErrorDetail(type="internal", message="the server failed; its log says why"))


def _reply(status: int, error: ErrorDetail, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(ErrorReply(error=error).model_dump(), status, headers)


def _http_error(request: Request, error: StarletteHTTPException) -> ErrorDetail:
    """What FastAPI refuses before any of our code runs."""
    if error.status_code == 400:  # bytes that are no UTF-8, or nesting too deep to parse
        return ErrorDetail(type="malformed_json", message="expected a JSON object, the body cannot be parsed")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return ErrorDetail(type="method_not_allowed", message=f"expected {allowed}, got {request.method}")
    return ErrorDetail(type="not_found", message="no such route: /docs lists those there are")


# What pydantic calls it, where that is not one of ours already; anything else is a wrong type.
ERROR_TYPES: dict[str, ErrorType] = {
    "missing": "missing_field", "extra_forbidden": "unknown_field", "literal_error": "invalid_value",
    "greater_than_equal": "invalid_value", "less_than_equal": "invalid_value", "invalid_value": "invalid_value",
    "empty_input": "empty_input", "too_many_inputs": "too_many_inputs",
}  # fmt: skip
MESSAGES = {"missing": "expected this field, it is missing", "extra_forbidden": "unknown field: /docs lists the known"}


def _explain(error: dict[str, Any]) -> tuple[int, ErrorDetail]:
    """(status, detail) for one error of pydantic."""
    path = error["loc"][1:]  # the first part is "body"
    if error["type"] == "json_invalid":
        message = f"expected a JSON object: {error['ctx']['error']} at character {path[0]}"
        return 400, ErrorDetail(type="malformed_json", message=message)
    if not path and error["type"] == "missing":
        return 400, ErrorDetail(type="malformed_json", message="expected a JSON object, the body is empty")
    if not path:
        message = "expected a JSON object, sent with content-type: application/json"
        return 422, ErrorDetail(type="wrong_type", message=message)
    context = error.get("ctx", {})
    limit = context.get("limit", context.get("le", context.get("ge")))
    type_ = ERROR_TYPES.get(error["type"], "wrong_type")
    status = 413 if type_ == "too_many_inputs" else 422
    message = MESSAGES.get(error["type"], error["msg"][0].lower() + error["msg"][1:])
    return status, ErrorDetail(type=type_, message=message, param=_param(path), limit=limit)


def _param(path: tuple[str | int, ...]) -> str:
    """`inputs[3]`; short and writable whatever the caller named a field."""
    first, *rest = path
    text = str(first) + "".join(f"[{part}]" for part in rest)
    return text[:100].encode("utf8", "replace").decode()
