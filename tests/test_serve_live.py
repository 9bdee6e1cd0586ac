"""`raydistil serve` under load, as a user starts it: more replicas and fewer, another student, a replica that dies."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file
from test_serve_run import fetch, session_of

from raydistil.bench.load import NO_ANSWER, Measured, Plan, put
from raydistil.bench.serve import student
from raydistil.serve.source import find

pytestmark = pytest.mark.alone
BODIES = tuple(json.dumps({"inputs": "how do I read a file " * n}).encode() for n in (1, 2, 4, 8))


@dataclass(frozen=True)
class Live:
    process: subprocess.Popen[str]
    url: str
    folder: Path
    lines: list[str]

    def replicas(self) -> list[int]:
        """Those that are up, and those that come up."""
        names = ((pid, _cmdline(pid)) for pid in session_of(self.process.pid))
        return [pid for pid, name in names if "ServeReplica:raydistil" in " ".join(name)]

    def load(self, rate: float, seconds: float) -> "Load":
        return Load(Plan(f"{self.url}/v1/classify", BODIES, rate, seconds, {"x-deadline-ms": "4000"}, 20.0, 0))


class Load(threading.Thread):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan, self.measured = plan, list[Measured]()
        self.start()

    def run(self) -> None:
        self.measured.append(put(self.plan))

    def statuses(self) -> dict[int, int]:
        self.join()
        return {status: count for status, count in self.measured[0].statuses.items() if count}


def _cmdline(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:  # it has just ended
        return []


@contextmanager
def started(folder: Path, *options: str) -> Iterator[Live]:
    """`raydistil serve` of a model in `folder`, until the end of the block; no process is left then."""
    command = [sys.executable, "-m", "raydistil", "serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    first = process.stderr.readline()
    found = re.match(r"serving \S+ at (http://127\.0\.0\.1:\d+) ", first)
    assert found, first + process.stderr.read()
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()))
    reader.start()
    try:
        yield Live(process, found[1], folder, lines)
    finally:
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 0 and session_of(process.pid) == []
        reader.join()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = Path(
        shutil.copytree(student(tmp_path_factory.mktemp("live")), tmp_path_factory.mktemp("served") / "model")
    )
    with started(folder, "--replicas", "2", "--calm", "12", "--backend", "torch") as live:
        yield live


def soon(true: Callable[[], Any], within_s: float = 60.0) -> Any:
    until = time.monotonic() + within_s
    while not (found := true()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.2)
    return found


def test_more_replicas_come_under_load_and_go_after_it(live: Live) -> None:
    assert len(live.replicas()) == 1
    load = live.load(rate=300.0, seconds=40.0)
    soon(lambda: len(live.replicas()) == 2, 40)
    statuses = load.statuses()
    # Ten times what a busy machine can do: the client itself may be too late for some.
    assert set(statuses) <= {NO_ANSWER, 200, 429, 504} and statuses[200] > statuses.get(504, 0)
    soon(lambda: len(live.replicas()) == 1)
    text = _text(f"{live.url}/metrics")
    served = {
        sample.labels["replica"]: sample.value
        for family in text_string_to_metric_families(text) for sample in family.samples
        if sample.name == "raydistil_requests_total" and sample.labels["status"] == "200"
    }  # fmt: skip
    assert len(served) == 2 and sum(served.values()) >= statuses[200]


def test_without_requests_there_is_no_replica_and_the_first_one_starts_it(tmp_path: Path) -> None:
    with started(student(tmp_path), "--least", "0", "--replicas", "1", "--calm", "5", "--backend", "torch") as live:
        for _ in range(2):
            soon(lambda: not live.replicas())
            status, answer = fetch(f"{live.url}/v1/classify", BODIES[0])
            assert (status, len(answer["results"])) == (200, 1) and len(live.replicas()) == 1


def test_requests_are_traced_where_serve_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans, trace_id = tmp_path / "spans", "0af7651916cd43dd8448eb211c80319c"
    spans.mkdir()
    monkeypatch.setenv("RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH", "spans:to_files")
    monkeypatch.setenv("SPANS_FOLDER", str(spans))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    with started(student(tmp_path), "--backend", "torch") as live:
        body = json.dumps({"inputs": "hello there"}).encode()
        headers = {"content-type": "application/json", "traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
        with urllib.request.urlopen(urllib.request.Request(f"{live.url}/v1/classify", body, headers)) as reply:
            tokens = int(reply.headers["x-compute-tokens"])
    lines = [json.loads(line) for file in spans.iterdir() for line in file.read_text().splitlines()]
    asked = [line["attributes"] for line in lines if line["context"]["trace_id"] == f"0x{trace_id}"]
    assert [each["raydistil.tokens"] for each in asked if "raydistil.tokens" in each] == [tokens]
    assert any(each.get("raydistil.inference_ms", 0.0) > 0 for each in asked)


def test_who_leaves_is_counted_as_one_who_left(live: Live) -> None:
    before = _answered(live, "499")
    body = json.dumps({"inputs": ["how do I read a file " * 40] * 64}).encode()
    with _asked(live, body, b""):
        time.sleep(0.3)
    assert soon(lambda: _answered(live, "499") == before + 1)
    assert _answered(live, "500") == 0


def test_serve_stumbles_over_no_header(live: Live) -> None:
    with _asked(live, b'{"inputs": "ba"}', b"x-request-id: caf\xe9\r\n") as connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 400 ")


def test_counts_outlive_the_actor_that_shows_them(live: Live) -> None:
    (board,) = (pid for pid in session_of(live.process.pid) if " ".join(_cmdline(pid)).startswith("ray::Board"))
    os.kill(board, signal.SIGKILL)
    assert live.load(rate=20.0, seconds=1.0).statuses().keys() == {200}
    assert soon(lambda: _answered(live, "200") >= 10)  # those of replicas that had gone are lost with it


def test_a_student_that_is_exported_anew_takes_over_and_no_request_fails(live: Live) -> None:
    before = fetch(f"{live.url}/info")[1]["version"]
    load = live.load(rate=30.0, seconds=25.0)
    time.sleep(2)
    fresh = live.folder.with_name("fresh")
    shutil.copytree(live.folder, fresh)
    weights = load_file(fresh / "model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
    live.folder.rename(live.folder.with_name("old"))
    fresh.rename(live.folder)
    expected = find(live.folder).version
    assert soon(lambda: fetch(f"{live.url}/info")[1]["version"] == expected) and expected != before
    assert load.statuses() == {200: sum(load.statuses().values())}
    soon(lambda: any("in place of" in line for line in live.lines))


def unreadable(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not weights")


def of_another_vocabulary(folder: Path) -> None:
    """Whole, as far as can be seen from outside; a replica finds out."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["another-word"] = len(words)
    path.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("spoil", [unreadable, of_another_vocabulary])
def test_a_student_that_cannot_be_served_does_not_take_over(live: Live, spoil: Callable[[Path], None]) -> None:
    version, said = fetch(f"{live.url}/info")[1]["version"], len(live.lines)
    broken, good = live.folder.with_name("broken"), live.folder.with_name("good")
    shutil.copytree(live.folder, broken)
    spoil(broken)
    live.folder.rename(good)
    broken.rename(live.folder)
    soon(lambda: any("still is" in line for line in live.lines[said:]), 120)
    assert fetch(f"{live.url}/info")[1]["version"] == version
    shutil.rmtree(live.folder)
    good.rename(live.folder)
    soon(lambda: fetch(f"{live.url}/v1/classify", BODIES[0])[0] == 200)


def itself(replica: int) -> int:
    return replica


def its_model(replica: int) -> int:
    (model,) = psutil.Process(replica).children()
    return model.pid


@pytest.mark.parametrize("killed", [itself, its_model])
def test_a_replica_that_dies_loses_no_request_that_another_can_answer(live: Live, killed: Callable[[int], int]) -> None:
    """Those that it had are asked of the one that Serve starts; who cannot wait gets a 503."""
    with at_least_two(live):
        load = live.load(rate=40.0, seconds=15.0)
        time.sleep(4)
        os.kill(killed(live.replicas()[0]), signal.SIGKILL)
        statuses = load.statuses()
    assert set(statuses) <= {200, 503} and statuses[200] >= 0.98 * sum(statuses.values())


@contextmanager
def at_least_two(live: Live) -> Iterator[None]:
    """While a load that one replica cannot take comes in."""
    load = Load(replace(live.load(rate=1.0, seconds=0.5).plan, rate=400.0, seconds=12.0))
    soon(lambda: len(live.replicas()) == 2, 30)
    load.join()
    yield


@contextmanager
def _asked(live: Live, body: bytes, header: bytes) -> Iterator[socket.socket]:
    """A connection on which a request was sent; closed after the block, whatever has come back."""
    host, _, port = live.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
        connection.sendall(head % len(body) + header + b"\r\n" + body)
        yield connection


def _answered(live: Live, status: str) -> float:
    """Requests so far, of all replicas."""
    families = text_string_to_metric_families(_text(f"{live.url}/metrics"))
    samples = (sample for family in families for sample in family.samples if "status" in sample.labels)
    return sum(each.value for each in samples if each.labels["status"] == status)


def _text(url: str, headers: dict[str, str] | None = None) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=30) as response:
        return str(response.read().decode())
