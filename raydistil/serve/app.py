"""The HTTP interface of a student. Knows nothing of Ray: Serve wraps what `build_api` returns."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Header, Response
from opentelemetry import trace
from pydantic import BaseModel
from starlette.responses import HTMLResponse, PlainTextResponse

from raydistil.serve.errors import ApiError, add_errors
from raydistil.serve.gate import Admission, BodyLimit, Counted
from raydistil.serve.keys import Key, Keys
from raydistil.serve.metrics import CONTENT_TYPE, Families, exposition
from raydistil.serve.model import ServedModel, Timing
from raydistil.serve.schema import (
    LATEST_MS,
    ROUTES,
    AnswerReply,
    AnswerRequest,
    Asked,
    ClassifyReply,
    ClassifyRequest,
    EmbeddingsReply,
    EmbeddingsRequest,
    ErrorReply,
    FillMaskReply,
    FillMaskRequest,
    Health,
    Info,
    ModelEntry,
    Models,
    Reply,
    ScoreReply,
    ScoreRequest,
    TokensReply,
    TokensRequest,
    within_s,
)
from raydistil.types import Task

R = TypeVar("R", bound=BaseModel)
Deadline = Annotated[float, Header(alias="x-deadline-ms", ge=1, le=3_600_000, allow_inf_nan=False)]
REFUSALS = (400, 413, 422, 429, 500, 503, 504)
PAGE = Path(__file__).with_name("page.html")
Replying = Callable[[Asked, float], Awaitable[tuple[Reply, Timing]]]  # within so many seconds
Gather = Callable[[Families], Awaitable[list[Families]]]


async def alone(families: Families) -> list[Families]:
    return [families]


def build_api(model: ServedModel, gather: Gather = alone, answering: Replying | None = None) -> FastAPI:
    """The route of the model's task, its state, and an answer for every error.

    `gather`: what this replica has counted, with that of the others. `answering`: else the model itself answers.
    """
    locked: dict[int | str, dict[str, Any]] = {401: {"model": ErrorReply}} if model.source.keys else {}
    app = FastAPI(
        title=f"raydistil: {model.source.name}", description="A distilled student.", redoc_url=None, responses=locked
    )
    app.add_middleware(BodyLimit)
    if model.source.keys:
        app.add_middleware(Admission, keys=Keys([Key(*each) for each in model.source.keys]))
    app.add_middleware(Counted, model=model, route=ROUTES[model.source.task])  # around all others: it counts theirs
    add_errors(app)
    _add_state(app, model)
    _add_metrics(app, model, gather)
    _add_task(app, model, answering or model.reply)
    return app


def _add_task(app: FastAPI, model: ServedModel, answering: Replying) -> None:
    """The route of the model's task; the others answer with this one's name."""
    here = ROUTES[model.source.task]
    refusals: dict[int | str, dict[str, Any]] = {code: {"model": ErrorReply} for code in REFUSALS}

    async def other_task() -> None:
        raise ApiError(404, "wrong_task", f"{model.source.name} was trained for {model.source.task}: use POST {here}")

    app.post(here, responses=refusals)(_endpoint(model.source.task, answering))
    for route in set(ROUTES.values()) - {here}:
        app.post(route, include_in_schema=False)(other_task)


def _endpoint(task: Task, answering: Replying) -> Callable[..., Awaitable[BaseModel]]:
    async def classify(request: ClassifyRequest, response: Response, by_ms: Deadline = LATEST_MS) -> ClassifyReply:
        """Score every label for each text."""
        return _timed(ClassifyReply, response, *await answering(request, within_s(by_ms)))

    async def score(request: ScoreRequest, response: Response, by_ms: Deadline = LATEST_MS) -> ScoreReply:
        """Give each text, or pair of texts, its number."""
        return _timed(ScoreReply, response, *await answering(request, within_s(by_ms)))

    async def tag(request: TokensRequest, response: Response, by_ms: Deadline = LATEST_MS) -> TokensReply:
        """Find the entities of each text, by their characters."""
        return _timed(TokensReply, response, *await answering(request, within_s(by_ms)))

    async def answer(request: AnswerRequest, response: Response, by_ms: Deadline = LATEST_MS) -> AnswerReply:
        """Find the answer to a question in a context."""
        return _timed(AnswerReply, response, *await answering(request, within_s(by_ms)))

    async def embed(request: EmbeddingsRequest, response: Response, by_ms: Deadline = LATEST_MS) -> EmbeddingsReply:
        """A vector of length 1 for each text."""
        return _timed(EmbeddingsReply, response, *await answering(request, within_s(by_ms)))

    async def fill_mask(request: FillMaskRequest, response: Response, by_ms: Deadline = LATEST_MS) -> FillMaskReply:
        """Candidates for every mask token of each text."""
        return _timed(FillMaskReply, response, *await answering(request, within_s(by_ms)))

    endpoints: dict[Task, Callable[..., Awaitable[BaseModel]]] = {
        "classification": classify, "regression": score, "token_classification": tag, "question_answering": answer,
        "embedding": embed, "mlm": fill_mask,
    }  # fmt: skip
    return endpoints[task]


def _timed(kind: type[R], response: Response, reply: Reply, timing: Timing) -> R:
    assert isinstance(reply, kind)
    response.headers.update(timing.headers())
    trace.get_current_span().set_attributes(timing.attributes())  # Serve's, where requests are traced
    return reply


def _add_metrics(app: FastAPI, model: ServedModel, gather: Gather) -> None:
    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Of all replicas, for Prometheus."""
        made = await gather(model.meter.families(model.batcher.load()))
        return PlainTextResponse(exposition(made), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        """To try the model by hand."""
        return HTMLResponse(PAGE.read_text(encoding="utf8"))


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

    @app.get("/v1/models", name="models")
    async def models() -> Models:
        """The one there is, as OpenAI's clients ask for it."""
        return Models(data=[ModelEntry(id=info.model)])
