"""Answers other than 2xx: each says what was expected, of which field, and what the limit is."""

import math
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from raydistil.serve.batcher import DeadlineExceeded, Draining, ItemFailed, NotServed, QueueFull
from raydistil.serve.schema import ErrorDetail, ErrorReply, ErrorType


class ApiError(HTTPException):
    """An answer other than 2xx. FastAPI lets an HTTPException pass where it would wrap any other."""

    def __init__(
        self, status: int, type_: ErrorType, message: str, param: str | None = None, limit: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, message, headers)
        self.error = ErrorDetail(type=type_, message=message, param=param, limit=limit)


def unserved(error: NotServed, field: str) -> ApiError:
    """What the batcher says, as an answer; `field`: of the request's items."""
    if isinstance(error, QueueFull):
        return ApiError(
            429, "overloaded", str(error), headers={"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
        )
    if isinstance(error, DeadlineExceeded):
        return ApiError(504, "deadline_exceeded", str(error))
    if isinstance(error, Draining):
        return ApiError(503, "stopping", str(error), headers={"Retry-After": "1"})
    assert isinstance(error, ItemFailed)
    message = f"the model failed at this input ({type(error.__cause__).__name__})"
    return ApiError(500, "internal", message, f"{field}[{error.index}]")


def add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return answered(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _reply(*_explain(error.errors()[0]))

    @app.exception_handler(StarletteHTTPException)
    async def other(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return _reply(error.status_code, _http_error(request, error), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> JSONResponse:
        return _reply(500, ErrorDetail(type="internal", message="the server failed; its log says why"))


def answered(error: ApiError) -> JSONResponse:
    """As an ASGI app."""
    return _reply(error.status_code, error.error, dict(error.headers or {}))


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
    """`inputs[3]`, `inputs[3].text_pair`; short and writable whatever the caller named a field."""
    first, *rest = path
    parts = [part for place, part in enumerate(rest) if place != 1]  # after an item's place: whether it is a pair
    text = str(first) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text[:100].encode("utf8", "replace").decode()
