"""An export at the hub: its client against a server that answers as the hub does, and keeps what it is sent."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from raydistil import rundir
from raydistil.cli import _guarded
from raydistil.config import Config, result_hash

TOKEN = "hf_notatoken"
NAME = "me/small"


class Hub(ThreadingHTTPServer):
    """One repository, in memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.there = self.private = False
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}  # by their hash
        self.messages: list[str] = []  # of the commits
        self.refuse: dict[str, int] = {}  # part of a path -> status

    def create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        assert (asked["organization"], asked["name"]) == tuple(NAME.split("/"))
        if self.there:
            return 409, {"error": "You already created this model repo", "url": f"{self.address}/{NAME}"}
        self.there, self.private = True, asked.get("visibility") == "private"
        return 200, {"url": f"{self.address}/{NAME}"}

    def wanted(self, asked: dict[str, Any]) -> tuple[int, Any]:
        """Which files are large; what is so is sent apart."""
        files = [
            {"path": file["path"], "uploadMode": _mode(file["path"]), "shouldIgnore": False} for file in asked["files"]
        ]
        return 200, {"files": files}

    def batch(self, asked: dict[str, Any]) -> tuple[int, Any]:
        found = [
            {**each, "actions": {"upload": {"href": f"{self.address}/large/{each['oid']}"}}}
            for each in asked["objects"]
        ]
        return 200, {"transfer": "basic", "objects": found}

    def commit(self, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                self.messages.append(value["summary"])
            elif key == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                self.files[value["path"]] = self.large[value["oid"]]
            else:
                assert key == "deletedFile"
                del self.files[value["path"]]
        return 200, {"commitUrl": f"{self.address}/{NAME}/commit/{'0' * 40}", "commitOid": "0" * 40}

    def tree(self) -> list[dict[str, Any]]:
        return [{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in self.files]


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".onnx")) else "regular"


class Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, said: Any) -> None:
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refused(self) -> int | None:
        if "/large/" not in self.path and self.headers["Authorization"] != f"Bearer {TOKEN}":
            return 401
        return next((status for part, status in self.server.refuse.items() if part in self.path), None)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def do_GET(self) -> None:
        hub, status = self.server, self._refused() or (None if self.server.there else 404)
        info = {"id": NAME, "private": hub.private, "siblings": [], "tags": []}
        if status is not None:
            self._answer(status, {"error": "not for you"})
        else:
            self._answer(200, hub.tree() if "/tree/" in self.path else info)

    def do_PUT(self) -> None:
        body = self._body()
        status = self._refused()
        if status is None:
            assert hashlib.sha256(body).hexdigest() == self.path.removeprefix("/large/")
            self.server.large[self.path.removeprefix("/large/")] = body
        self._answer(status or 200, {})

    def do_POST(self) -> None:
        hub, lines = self.server, [json.loads(line) for line in self._body().splitlines()]
        status = self._refused()
        routes = {
            "/api/repos/create": hub.create, f"/api/models/{NAME}/preupload/main": hub.wanted,
            f"/{NAME}.git/info/lfs/objects/batch": hub.batch, "/api/validate-yaml": lambda asked: (200, {}),
        }  # fmt: skip
        if status is not None:
            self._answer(status, {"error": "not for you"})
        elif self.path.startswith(f"/api/models/{NAME}/commit/main"):
            self._answer(*hub.commit(lines))
        else:
            self._answer(*routes[self.path](lines[0]))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """What the client reads of the environment when it is imported is set here."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run_dir(finished: tuple[Config, dict[str, Any]], tmp_path: Path) -> Path:
    """A finished run that has not been exported."""
    config, _ = finished
    path = tmp_path / "tiny"
    shutil.copytree(config.run_dir, path, ignore=shutil.ignore_patterns(rundir.LOCK, rundir.STUDENT))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


# ---- what arrives


def test_what_arrives_is_the_students_directory_in_one_commit(
    hub: Hub, run_dir: Path, finished: tuple[Config, dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    stale = (
        "onnx/model_int8.onnx",
        "model.bf16.safetensors",
        "int8-torchao/config.json",
        "fp8-torchao/model.safetensors",
    )
    hub.files = dict.fromkeys(stale, b"of another student") | {"LICENSE": b"mine"}
    assert _guarded(["export", str(run_dir), "--to", "hf", "--push", NAME, "--json"]) == 0
    said = capfd.readouterr()
    assert hub.files.pop("LICENSE") == b"mine"
    assert hub.files == files_of(run_dir / rundir.STUDENT) and "model.safetensors" in hub.files
    assert hub.messages == [f"tiny: exported by raydistil, configuration {result_hash(finished[0])}"]
    assert json.loads(said.out)["pushed"] == f"{hub.address}/{NAME}" and not hub.private
    assert f'model = pipeline("text-classification", "{NAME}")' in hub.files["README.md"].decode()
    assert TOKEN not in said.out + said.err
    published = [hub.files[name].decode() for name in ("README.md", "raydistil.json", "config.json")]
    assert not any(str(run_dir.parent) in text or "pytest-of" in text for text in published)


def test_a_private_one_is_made_private_and_an_open_one_is_not_filled(
    hub: Hub, run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ["export", str(run_dir), "--to", "hf", "--push", NAME, "--private"]
    assert _guarded(asked) == 0 and hub.private and hub.files
    assert _guarded(asked) == 0  # it is there, and private
    hub.private, hub.files = False, {}
    assert _guarded(asked) == 2
    assert "expected me/small to be private, it is there and open to all" in capfd.readouterr().err
    assert hub.files == {}


@pytest.mark.slow
def test_the_command_takes_its_token_and_the_hub_from_the_environment(hub: Hub, run_dir: Path) -> None:
    env = {
        **os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "raydistil", "export", str(run_dir), "--to", "hf", "--push", NAME]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert hub.files == files_of(run_dir / rundir.STUDENT)
    assert TOKEN not in done.stdout + done.stderr
    assert f"push: there, at {hub.address}/{NAME}" in done.stderr


# ---- what does not


@pytest.mark.parametrize("name", ["small", "me/", "/small", "me/small/er", "me/sm all", "me/-small", "me/a--b", ""])
def test_what_is_no_name_is_refused_before_anything_is_exported(
    name: str, run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _guarded(["export", str(run_dir), "--push", name]) == 2
    expected = f"error: --push: expected OWNER/NAME of a repository at the hub, got {name!r}: name one\n"
    assert capfd.readouterr().err == expected
    assert not (run_dir / rundir.STUDENT).exists()


def test_without_a_token_nothing_is_exported(
    hub: Hub, run_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert _guarded(["export", str(run_dir), "--push", NAME]) == 2
    expected = "error: --push: expected a token of the hub, found none: run hf auth login, or set HF_TOKEN\n"
    assert capfd.readouterr().err == expected
    assert not (run_dir / rundir.STUDENT).exists() and not hub.there


def test_private_is_of_a_repository(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _guarded(["export", str(run_dir), "--private"]) == 2
    assert "--private is of a repository: name one with --push OWNER/NAME" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        ("", 401, r"401 Unauthorized \(not for you\), check the token"),
        ("/repos/create", 403, r"403 Forbidden \(not for you\), check that the token may write there"),
        ("/repos/create", 500, r"500 Internal Server Error \(not for you\)"),
        ("/preupload/", 503, r"503 Service Unavailable.*"),
        ("/large/", 403, r"403 Forbidden, check that the token may write there"),
        ("/commit/", 500, r"500 Internal Server Error \(not for you\)"),
    ],
)
def test_what_the_hub_refuses_is_one_line_and_the_export_is_whole(
    part: str, status: int, said: str, hub: Hub, run_dir: Path, capfd: pytest.CaptureFixture[str], no_pauses: None
) -> None:
    hub.refuse = {part: status}
    assert _guarded(["export", str(run_dir), "--to", "hf", "--push", NAME]) == 2
    *_, last = capfd.readouterr().err.splitlines()
    expected = rf"error: --push: expected {hub.address} to take {NAME}, got: {said}; the export is whole in \S+"
    assert re.fullmatch(expected, last)
    assert hub.files == {} and hub.messages == []
    assert {"README.md", "config.json", "model.safetensors"} <= set(files_of(run_dir / rundir.STUDENT))


def test_no_hub_at_all_is_one_line_too(
    hub: Hub, run_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert _guarded(["export", str(run_dir), "--to", "hf", "--push", NAME]) == 2
    *_, last = capfd.readouterr().err.splitlines()
    assert last.startswith(f"error: --push: expected {hub.address} to take {NAME}, got: ") and "HF_HUB_OFFLINE" in last
