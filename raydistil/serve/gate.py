"""Before the app: who may ask, how long a body may be, and the count of what was answered."""

import asyncio
import math
import time
from collections.abc import Callable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raydistil.serve.batcher import NotServed
from raydistil.serve.errors import ApiError, answered, unserved
from raydistil.serve.keys import Keys
from raydistil.serve.metrics import GONE
from raydistil.serve.model import ServedModel
from raydistil.serve.schema import LATEST_MS, MAX_BODY_BYTES, within_s

# Headers that Serve reads: `_` stands for `-`, too.
SERVES = (
    b"x-request-id", b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"x-session-id",
    b"serve-multiplexed-model-id", b"traceparent", b"tracestate",
)  # fmt: skip
OPEN = ("/", "/livez", "/readyz", "/docs", "/openapi.json")  # nothing of these is anybody's


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


class Admission:
    """ASGI middleware: an API key, where there are keys, and no more requests with it than it allows."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" and _path(scope) not in OPEN else None
        await (self.app if refusal is None else answered(refusal))(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        given = dict(scope["headers"]).get(b"authorization", b"").decode("latin1")
        kind, _, key = given.partition(" ")
        owner = self._keys.owner(key.strip()) if kind.lower() == "bearer" else None
        if owner is None:
            message = "expected a key that is known, as authorization: Bearer KEY"
            return ApiError(401, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"})
        wait_s = owner.wait_s()
        if wait_s > 0:
            message = f"expected at most {owner.rate:g} requests a second with this key, retry in {wait_s:.1f} s"
            return ApiError(429, "rate_limited", message, headers={"Retry-After": str(math.ceil(wait_s))})
        return None


class Counted:
    """ASGI middleware: the model's requests by their status, and how long they took.

    What could not be answered in time is refused before anybody reads it: under an overload that is most of what comes.
    """

    def __init__(self, app: ASGIApp, model: ServedModel, route: str) -> None:
        self.app, self._model, self._route = app, model, route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _path(scope) != self._route:
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def seen(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await (_refused(self._model, scope) or self.app)(scope, receive, seen)
        except asyncio.CancelledError:
            status = GONE
            raise
        finally:
            self._model.meter.request(status, time.perf_counter() - started)


def refusal(model: ServedModel, route: str) -> Callable[[Scope], ASGIApp | None]:
    """What `Counted` would refuse, and what Serve would stumble over, for one who stands before both; counted as there.
    Wherever the app is mounted.
    """

    def refused(scope: Scope) -> ASGIApp | None:
        started, ours = time.perf_counter(), scope["path"].endswith(route)
        response = _unreadable(scope) or (_refused(model, scope) if ours else None)
        if ours and response is not None:
            model.meter.request(response.status_code, time.perf_counter() - started)
        return response

    return refused


def _unreadable(scope: Scope) -> JSONResponse | None:
    """Where a header that Serve reads, outside of what turns errors into answers, is not UTF-8."""
    for name, value in scope["headers"]:
        if name.replace(b"_", b"-") not in SERVES:
            continue
        try:
            value.decode()
        except UnicodeDecodeError:
            message = f"expected headers in UTF-8, {name.decode('latin1')} is not"
            return answered(ApiError(400, "malformed_header", message, name.decode("latin1")))
    return None


def _refused(model: ServedModel, scope: Scope) -> JSONResponse | None:
    try:
        by_ms = float(dict(scope["headers"]).get(b"x-deadline-ms", LATEST_MS))
        if by_ms >= 1:  # else it is for the app to say what is wrong
            model.batcher.check(asyncio.get_running_loop().time() + within_s(by_ms))
    except NotServed as error:
        return answered(unserved(error, ""))
    except ValueError:  # nor is it a number
        pass
    return None


def _path(scope: Scope) -> str:
    """Below where the app is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"
