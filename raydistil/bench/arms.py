"""What the server is measured against: the same model, reader and threads behind plain FastAPI, and `@serve.batch`.

As one would write them by hand: one text a request, no queue that is bounded, no deadlines, no list of inputs.
"""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from pydantic import BaseModel

from raydistil.serve.apart import settled
from raydistil.serve.backends import Result, Row, numbers_of, softmax
from raydistil.serve.model import ServedModel, load
from raydistil.serve.schema import Source
from raydistil.serve.served import Hardware, Replicas

if TYPE_CHECKING:
    from ray.serve import Application

SOURCE, CPUS = "RAYDISTIL_BENCH_SOURCE", "RAYDISTIL_BENCH_CPUS"  # of `bare`: as JSON, and how many
# Between any two operations a model's thread waits for Python's lock, at Python's own setting for up to 5 ms: with this
# one, a server that is asked for too much answers a fifth more.
SWITCH_S = 0.0002
BATCH, WAIT_S = 32, 0.005  # of @serve.batch
ONGOING = 4096  # what one replica may have at once; Serve's default of 5 would keep batches small
Run = Callable[[Row], Awaitable[Result]]


class ClassifyOne(BaseModel):
    inputs: str


class EmbedOne(BaseModel):
    input: str
    model: str = ""


def plain_api(model: ServedModel, run: Run) -> FastAPI:
    """One text in, one answer out, whatever `run` does to get it."""
    app = FastAPI()

    async def said(text: str) -> tuple[int, Result]:
        (encoded,) = await asyncio.to_thread(model.reader.texts, [text], "right")
        return encoded.tokens, await run(Row(encoded.ids))

    @app.post("/v1/classify")
    async def classify(request: ClassifyOne) -> dict[str, Any]:
        tokens, logits_C = await said(request.inputs)
        labels, scores_C = model.labels or [], softmax(logits_C)
        scores = [{"label": labels[n], "score": float(scores_C[n])} for n in (-scores_C).argsort()]
        return {"model": model.source.name, "results": [{**scores[0], "scores": scores, "tokens": tokens}]}

    @app.post("/v1/embeddings")
    async def embed(request: EmbedOne) -> dict[str, Any]:
        tokens, vector_D = await said(request.input)
        data = [{"object": "embedding", "index": 0, "embedding": vector_D.tolist()}]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": model.source.name, "usage": usage}

    return app


def bare() -> FastAPI:
    """For uvicorn: texts one after the other, in one thread."""
    model = _loaded(Source(**json.loads(os.environ[SOURCE])), int(os.environ[CPUS]))
    thread = ThreadPoolExecutor(1)

    async def run(row: Row) -> Result:
        (said,) = await asyncio.get_running_loop().run_in_executor(thread, numbers_of, model.backend, [row])
        return said

    return plain_api(model, run)


class Batched:
    """A replica with Serve's own batches."""

    def __init__(self, source: Source, cpus: int) -> None:
        from ray import serve

        model = self._model = _loaded(source, cpus)

        @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT_S)
        async def run(rows: list[Row]) -> list[Result]:
            return await asyncio.to_thread(numbers_of, model.backend, rows)

        self._run: Any = run

    def __serve_build_asgi_app__(self) -> FastAPI:
        return plain_api(self._model, self._run)


def batched(source: Source, replicas: Replicas) -> "Application":
    from ray import serve

    deployment: Any = serve.deployment(
        serve.ingress()(Batched), name="batched", num_replicas=replicas.most, max_ongoing_requests=ONGOING,
        ray_actor_options={"num_cpus": 0}, health_check_timeout_s=60,  # on the app's CPUs, in turn with it
    )  # fmt: skip
    bound: Application = deployment.bind(source, replicas.cpus)
    return bound


def _loaded(source: Source, cpus: int) -> ServedModel:
    sys.setswitchinterval(SWITCH_S)
    model = load(source, Hardware(cpus))
    settled()
    return model
