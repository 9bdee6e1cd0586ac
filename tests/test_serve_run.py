"""Serving: what is refused before Ray starts, the app on Ray Serve, and the end of the command."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from fastapi.testclient import TestClient

from raydistil.cluster import _uninterrupted
from raydistil.errors import ModelError, PlanError, RaydistilError, StorageError
from raydistil.serve.deployments import assigned
from raydistil.serve.model import load
from raydistil.serve.ports import free_port, url_of
from raydistil.serve.run import check_cluster, example, holds, serve_forever, serving
from raydistil.serve.schema import MAX_BODY_BYTES
from raydistil.serve.served import Beside, Hardware, Replicas, Served, Wishes
from raydistil.serve.source import find

LONG = "ba " * 100  # every word is one token
JSON = {"content-type": "application/json"}


# ---- before Ray starts


def without(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-100])


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return change


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shutil.rmtree, "found none at"),
        (without("config.json"), "config.json is not there"),
        (without("model.safetensors"), "model.safetensors is not there"),
        (without("tokenizer.json"), "tokenizer.json is not there"),
        (cut("config.json"), "config.json is not JSON"),
        (cut("model.safetensors"), "model.safetensors is broken"),
        (cut("tokenizer.json"), "tokenizer.json is not JSON"),
        (lambda path: (path / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (configured(architectures=["BertModel"]), "its architecture is BertModel"),
        (configured(architectures=None), "its architecture is not given"),
        (configured(problem_type="multi_label_classification"), "its problem_type is multi_label_classification"),
        (configured(hash="00", architectures=None), "run raydistil export first"),
    ],
)
def test_what_is_no_whole_model_is_refused_before_ray(
    filler_dir: Path, tmp_path: Path, spoil: Callable[[Path], object], says: str
) -> None:
    path = Path(shutil.copytree(filler_dir, tmp_path / "model"))
    spoil(path)
    with pytest.raises(StorageError, match=re.escape(says)):
        serve_forever(Wishes(str(path)), "127.0.0.1", 0, pytest.fail)


def test_a_tokenizer_of_another_model_is_refused(filler_dir: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(filler_dir, tmp_path / "model"))
    tiny.tokenizer((*tiny.WORDS, "more")).save_pretrained(path)
    with pytest.raises(ModelError, match="the tokenizer has"):
        load(find(path))


def test_a_port_in_use_is_refused_before_ray(filler_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy, pytest.raises(RaydistilError, match="already in use"):
        serve_forever(Wishes(str(filler_dir)), "127.0.0.1", busy.getsockname()[1], pytest.fail)


def test_a_host_that_is_not_ours_is_refused_before_ray(filler_dir: Path) -> None:
    with pytest.raises(RaydistilError, match="Cannot assign requested address"):
        serve_forever(Wishes(str(filler_dir)), "192.0.2.77", 0, pytest.fail)


def test_urls_of_ipv6_have_brackets() -> None:
    assert (url_of("::1", 80), url_of("127.0.0.1", 80)) == ("http://[::1]:80", "http://127.0.0.1:80")


def test_the_example_is_a_request_the_model_answers(classifier_run: Path, filler_dir: Path, tmp_path: Path) -> None:
    assert '"How do I open a file?"' in example(find(classifier_run), "http://x")
    assert '"Paris is the [MASK] of France."' in example(find(filler_dir), "http://x")
    path = Path(shutil.copytree(filler_dir, tmp_path / "model"))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"mask_token": {"content": "<mask>"}}))
    assert "/v1/fill-mask" in example(find(path), "http://x") and "<mask>" in example(find(path), "http://x")
    (path / "tokenizer_config.json").unlink()
    assert example(find(path), "http://x") == "curl http://x/info"


def test_the_command_does_not_wait_for_pytorch() -> None:
    """Replicas load the model: the process that starts them needs seconds less."""
    looks = "import sys, raydistil.serve.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", looks]).returncode == 0


def test_ctrl_c_waits_for_the_start_of_ray() -> None:
    done = False
    with pytest.raises(KeyboardInterrupt), _uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done = True
    assert done


# ---- on Ray Serve


def fetch(url: str, body: bytes | None = None) -> tuple[int, Any]:
    request = urllib.request.Request(url, body, JSON)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def rounded(answer: Any) -> Any:
    """Its scores to five digits: how many texts a batch has moves the last ones."""
    return json.loads(json.dumps(answer), parse_float=lambda number: round(float(number), 5))


@pytest.mark.parametrize(
    ("each", "count", "line"),
    [
        (Replicas(cpus=3), 3, "expected 3 CPU for each of 3 replicas, found 8: lower --replicas or --cpus"),
        (Replicas(gpus=0.5), 1, "expected 0.5 GPU for each of 1 replicas, found 0: lower --replicas or --gpus"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(ray_cluster: None, each: Replicas, count: int, line: str) -> None:
    with pytest.raises(PlanError, match=line):
        check_cluster(each, count)
    check_cluster(Replicas(cpus=3), 2)


def test_a_gpu_holds_as_many_shares_as_there_are_in_it() -> None:
    assert [holds(1.0, 1 / n) for n in range(1, 21)] == list(range(1, 21))
    assert (holds(1.0, 0.3), holds(1.0, 0.51), holds(0.0, 0.2), holds(3.0, 2)) == (3, 1, 0, 1)


def test_a_replica_has_what_ray_has_set_aside_for_it(ray_cluster: None) -> None:
    import ray

    told: Any = ray.remote(assigned)
    assert ray.get(told.options(num_cpus=2).remote()) == Hardware(2, on_gpu=False)


def test_serve_answers_as_the_app_does(ray_cluster: None, classifier_run: Path, classifier: TestClient) -> None:
    from ray import serve

    port = free_port("127.0.0.1", 0)
    url = url_of("127.0.0.1", port)
    body = json.dumps({"inputs": ["ba ca", LONG], "top_k": 2}).encode()
    try:
        with serving(Served(find(classifier_run), Replicas(1, 2), Beside()), "127.0.0.1", port):
            status, info = fetch(f"{url}/info")
            chosen = {"backend": info["backend"], "texts_s": info["texts_s"]}  # by each replica for itself
            assert (status, info) == (200, classifier.get("/info").json() | chosen)
            assert fetch(f"{url}/readyz") == (200, {"status": "ok"})
            status, answer = fetch(f"{url}/v1/classify", body)
            here = classifier.post("/v1/classify", content=body, headers=JSON).json()
            assert (status, rounded(answer)) == (200, rounded(here))
            assert fetch(f"{url}/v1/fill-mask", body)[0] == 404
            assert fetch(f"{url}/v1/classify", b"{")[0] == 400
            assert fetch(f"{url}/v1/classify", b" " * 2 * MAX_BODY_BYTES)[0] == 413
            shown = subprocess.run(example(find(classifier_run), url), shell=True, capture_output=True, check=True)
            assert json.loads(shown.stdout)["results"][0]["label"] in tiny.LABELS
    finally:
        serve.shutdown()


def session_of(leader: int) -> list[int]:
    """Live processes of the session that `leader` started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = entry.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) == leader and state != "Z":
            found.append(int(entry.parent.name))
    return found


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_well_and_leaves_no_process(filler_dir: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", "from raydistil.cli import main; main()", "serve", str(filler_dir), "--port", "0"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stderr is not None
    first = process.stderr.readline()
    assert re.match(r"serving filler at http://127\.0\.0\.1:\d+ \(try: curl ", first)
    os.killpg(process.pid, number)  # as a terminal does
    *_, last = process.stderr.read().splitlines()
    assert (last, process.wait()) == ("stopped serving filler", 0)
    assert session_of(process.pid) == []
