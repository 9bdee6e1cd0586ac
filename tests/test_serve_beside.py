"""`raydistil serve` with a teacher in the shadow and a canary that does badly; what it prints for `serve deploy`."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file
from test_serve_live import _text, soon, started
from test_serve_run import fetch, session_of

from raydistil.cluster import ENVIRONMENT
from raydistil.serve.ports import free_port

pytestmark = pytest.mark.alone
BODY = json.dumps({"inputs": "ba ca da", "top_k": 1}).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_model(tmp_path / "own", "classification")


def turned(folder: Path, name: str) -> Path:
    """The same model, which says of no text what it says."""
    other = Path(shutil.copytree(folder, folder.with_name(name)))
    weights = load_file(other / "model.safetensors")
    turned = {part: -weights[part] for part in ("classifier.weight", "classifier.bias")}
    save_file({**weights, **turned}, other / "model.safetensors", {"format": "pt"})
    return other


def counted(url: str) -> dict[tuple[str, ...], float]:
    """Of all replicas, by name and other labels."""
    found: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(_text(f"{url}/metrics")):
        for sample in family.samples:
            key = (sample.name, *(text for label, text in sample.labels.items() if label != "replica"))
            found[key] = found.get(key, 0) + sample.value
    return found


def test_a_teacher_is_compared_and_a_canary_that_disagrees_is_rolled_back(folder: Path) -> None:
    teacher, canary = shutil.copytree(folder, folder.with_name("teacher")), turned(folder, "canary")
    beside = ["--teacher", str(teacher), "--shadow", "1", "--canary", str(canary), "--canary-share", "0.5"]
    with started(folder, "--replicas", "1", *beside) as live:
        answers = list[tuple[str, str]]()

        def ask() -> bool:
            status, reply = fetch(f"{live.url}/v1/classify", BODY)
            assert status == 200
            answers.append((reply["model"], reply["results"][0]["label"]))
            return any("rolled back" in line for line in live.lines)

        soon(ask)
        (label,) = {said for model, said in answers if model == "own"}
        assert label not in {said for model, said in answers if model == "canary"}
        assert {model for model, _ in answers} == {"own", "canary"}
        (told,) = (line for line in live.lines if "rolled back" in line)
        assert told.startswith(f"canary {canary} is rolled back: it disagreed on 100.0% of ")
        found = soon(lambda: _compared(live.url, 3))
        assert found["raydistil_agreement_total", "teacher"] == found["raydistil_compared_total", "teacher"]
        soon(lambda: len(live.replicas()) == 2)  # the student and its teacher: the canary gave its own back
        assert [fetch(f"{live.url}/v1/classify", BODY)[1]["model"] for _ in range(20)] == ["own"] * 20


def _compared(url: str, least: int) -> dict[tuple[str, ...], float] | None:
    found = counted(url)
    return found if found.get(("raydistil_compared_total", "teacher"), 0) >= least else None


@pytest.fixture
def printed(folder: Path, tmp_path: Path) -> Path:
    """What `serve --yaml` prints, on a port that is free."""
    port, keys = free_port("127.0.0.1", 0), tmp_path / "keys.txt"
    command = [sys.executable, "-m", "raydistil"]
    key = subprocess.run([*command, "key", "ada", "--file", keys], capture_output=True, text=True, check=True).stdout
    asked = [*command, "serve", str(folder), "--port", str(port), "--keys", str(keys), "--yaml"]
    file = tmp_path / "serve.yaml"
    file.write_bytes(subprocess.run(asked, capture_output=True, check=True).stdout)
    (tmp_path / "key").write_text(key.strip())
    return file


@pytest.fixture
def deployed(printed: Path) -> Iterator[str]:
    """By Ray's own command, which starts a cluster where there is none; that wants a token, as those of cluster/ do."""
    environment = os.environ | ENVIRONMENT | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    process = subprocess.Popen(
        [Path(sys.executable).with_name("serve"), "run", printed, "--address", "local"], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    settings: dict[str, Any] = yaml.safe_load(printed.read_text())
    yield f"http://127.0.0.1:{settings['http_options']['port']}"
    process.send_signal(signal.SIGINT)
    process.wait(60)
    for left in session_of(process.pid):
        with suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)


def test_rays_own_command_deploys_what_is_printed(printed: Path, deployed: str) -> None:
    def up() -> bool:
        try:
            return fetch(f"{deployed}/livez")[0] == 200
        except (OSError, ValueError):  # not there yet, or Serve without an app
            return False

    soon(up, 120)
    assert fetch(f"{deployed}/v1/classify", BODY)[0] == 401
    key = (printed.parent / "key").read_text()
    assert json.loads(_text(f"{deployed}/info", {"authorization": f"Bearer {key}"}))["model"] == "own"
