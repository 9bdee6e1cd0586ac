"""Before Serve: what the model of this process cannot answer in time is refused before Serve looks at it.

Under an overload that is most of what comes, and Serve spends as long on a request as the app does. Ray imports this in
processes that have no model, too: nothing heavy is imported here.
"""

import uuid
from collections.abc import Callable

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Refusal = Callable[[Scope], ASGIApp | None]
REQUEST_ID = b"x-request-id"  # as Serve calls it

_refusals: list[Refusal] = []  # of the model in this process; none before it is loaded


def refuse_by(refusal: Refusal) -> None:
    """From now on, in this process."""
    _refusals[:] = [refusal]


def middlewares() -> list[Middleware]:
    """What RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names."""
    return [Middleware(Early)]


class Early:
    """ASGI middleware: a refusal, where there is one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = _refusals[0](scope) if _refusals and scope["type"] == "http" else None
        if refused is None:
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(REQUEST_ID, b"")
        request_id = given if given and given.isascii() else uuid.uuid4().hex.encode()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (REQUEST_ID, request_id)]
            await send(message)

        await refused(scope, receive, named)
