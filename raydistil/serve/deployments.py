"""The Serve application: the student's replicas, and those of what answers beside it."""

import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from raydistil.serve.early import refuse_by
from raydistil.serve.metrics import Board, Families
from raydistil.serve.offer import offered
from raydistil.serve.scaling import Stats, settings
from raydistil.serve.schema import ROUTES, Asked, Source
from raydistil.serve.served import Beside, Hardware, Name, Replicas, Served, Wishes

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

    from raydistil.serve.answering import Answer, Ask

APP, DEPLOYMENT, BOARD = "raydistil", "student", "metrics"
MAX_ONGOING = 4096  # requests of one replica, waiting ones included: its own bound, in tokens, is to be the first


class Replica:
    """A model in a process of its own, and what Serve asks of it."""

    def __init__(self, source: Source) -> None:
        from ray import serve

        from raydistil.serve.apart import choose_apart, settled
        from raydistil.serve.model import load

        self._name = serve.get_replica_context().replica_id.unique_id
        self._stats, self._board = Stats(), board()
        source = replace(source, directory=source.kept or source.directory)
        self._model = load(source, assigned(), self._name, choose_apart)
        threading.Thread(target=self._end_with_model, daemon=True).start()
        settled()

    def _end_with_model(self) -> None:
        """Where the model's process dies, at once: what it had is asked of another replica, with no 500 between."""
        backend: Any = self._model.backend
        backend.wait()
        os._exit(1)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        load = self._model.batcher.load()
        self._board.show.remote(self._name, self._model.meter.families(load))
        return self._stats.now(load)


class Student(Replica):
    """With the app around it, for which Serve itself asks."""

    def __init__(self, source: Source, beside: Beside, handles: dict[Name, Any]) -> None:
        from raydistil.serve.answering import Answering
        from raydistil.serve.gate import refusal

        super().__init__(source)
        refuse_by(refusal(self._model, ROUTES[source.task]))
        self._canary = beside.canary
        self._answering = Answering(self._model, beside, {name: _by(handle) for name, handle in handles.items()})

    def __serve_build_asgi_app__(self) -> "FastAPI":
        from raydistil.serve.app import build_api

        return build_api(self._model, self._gather, self._answering.answer)

    async def _gather(self, families: Families) -> list[Families]:
        made: list[Families] = await self._board.show.remote(self._name, families)
        return made

    async def record_autoscaling_stats(self) -> dict[str, float]:
        if self._canary is not None:
            canary, own = self._canary, self._answering
            own.stopped = await self._board.tried.remote(
                canary.source.version, canary.limits, self._name, own.tried, own.stopped
            )  # fmt: skip
        return await super().record_autoscaling_stats()


class Companion(Replica):
    """Asked by replicas of the student."""

    async def ask(self, request: Asked, within_s: float) -> "Answer":
        """Raises RuntimeError where the app would answer something else than 200."""
        from raydistil.serve.errors import ApiError

        try:
            return await self._model.reply(request, within_s)
        except ApiError as error:  # which does not come through whole
            raise RuntimeError(f"{error.status_code} {error.error.message}") from None


def assigned() -> Hardware:
    """What Ray has set aside for this replica."""
    import ray

    found = ray.get_runtime_context().get_assigned_resources()
    return Hardware(max(1, int(found.get("CPU", 1))), found.get("GPU", 0) > 0)


def _by(handle: Any) -> "Ask":
    async def ask(request: Asked, within_s: float) -> "Answer":
        answered: Answer = await handle.ask.remote(request, within_s)
        return answered

    return ask


def board() -> Any:
    """The actor on which replicas show their counts. Where it dies another one begins, and is shown them again."""
    import ray

    kept: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board)
    return kept.options(name=BOARD, namespace=APP, lifetime="detached", get_if_exists=True).remote()


def application(served: Served) -> "Application":
    """A deployment of the student, and one of each that answers beside it."""
    from ray import serve

    beside, replicas = served.beside, served.replicas
    handles = {
        name: _deployment(Companion, name, replace(replicas, least=1)).bind(source)
        for name, source in beside.sources().items()
    }
    student = _deployment(serve.ingress()(Student), DEPLOYMENT, replicas)
    bound: Application = student.bind(served.source, beside, handles)
    return bound


def built(args: dict[str, Any]) -> "Application":
    """What `serve deploy` asks for; `args` are Wishes. Raises RaydistilError as `offered` does."""
    return application(offered(TypeAdapter(Wishes).validate_python(args)))


def _deployment(kind: Any, name: str, replicas: Replicas) -> Any:
    from ray import serve

    return serve.deployment(
        kind,
        name=name,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        max_ongoing_requests=MAX_ONGOING,
        autoscaling_config=settings(replicas.least, replicas.most, replicas.calm_s),
        max_surge_percent=100,
        health_check_period_s=10,
        health_check_timeout_s=60,
    )
