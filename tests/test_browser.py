"""Exported ONNX files in a real browser: onnxruntime-web under wasm says what onnxruntime says here."""

import json
import os
import queue
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from raydistil.export import FILES, ONNX
from raydistil.export.onnx import OnnxModel, to_onnx
from raydistil.export.smaller import to_int8
from raydistil.heads import Inputs
from raydistil.models import load_model, load_tokenizer

RUNTIME = "onnxruntime-web@1.30.0"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
TEXT = "ba be bi fo fu ga ha he hi"
# Fetches a model as a page would, and sends home what it says.
PAGE = """<!doctype html><script type="module">
const said = {};
try {
  const ort = await import("/runtime/ort.wasm.min.mjs");
  ort.env.wasm.wasmPaths = "/runtime/";
  ort.env.wasm.numThreads = 1;
  const asked = await (await fetch("/asked")).json();
  const tensor = (rows) => new ort.Tensor(
    "int64", BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]
  );
  for (const file of asked.files) {
    const session = await ort.InferenceSession.create("/" + file, { executionProviders: ["wasm"] });
    const made = await session.run({ input_ids: tensor(asked.ids), attention_mask: tensor(asked.mask) });
    said[file] = { shape: made.logits.dims, logits: Array.from(made.logits.data) };
  }
} catch (error) {
  said.error = String(error);
}
await fetch("/said", { method: "POST", body: JSON.stringify(said) });
</script>"""


class Site(ThreadingHTTPServer):
    """An exported directory, the runtime beside it, and the page that uses both."""

    def __init__(self, student: Path, runtime: Path, asked: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), Pages)
        self.student, self.runtime = student, runtime
        self.made = {"/": PAGE.encode(), "/asked": json.dumps(asked).encode()}
        self.said: queue.Queue[dict[str, Any]] = queue.Queue()


class Pages(SimpleHTTPRequestHandler):
    server: Site

    def log_message(self, *_: Any) -> None:
        pass

    def translate_path(self, path: str) -> str:
        inside = path.removeprefix("/runtime/")
        return str(self.server.student / path[1:] if inside == path else self.server.runtime / inside)

    def do_GET(self) -> None:
        body = self.server.made.get(self.path)
        if body is None:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if self.path == "/" else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.server.said.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(CHROMIUM)} is on this machine")
    return found


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of onnxruntime-web."""
    if shutil.which("npm") is None:
        pytest.skip(f"no npm to install {RUNTIME} with")
    folder = tmp_path_factory.mktemp("web")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), RUNTIME]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        pytest.skip(f"npm cannot install {RUNTIME}: {done.stderr.strip().splitlines()[-1]}")
    return folder / "node_modules" / "onnxruntime-web" / "dist"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_model(tmp_path_factory.mktemp("browser") / "student", "classification")
    (folder / ONNX.parent).mkdir()
    to_onnx(load_model(str(folder), "classification"), "classification", folder / ONNX)
    to_int8(folder / ONNX, folder / FILES["int8"])
    return folder


@contextmanager
def open_page(browser: str, site: Site, profile: Path) -> Iterator[None]:
    """In a process group of its own, which ends with it."""
    address = f"http://127.0.0.1:{site.server_port}/"
    with (profile.parent / "browser.log").open("w") as log:
        process = subprocess.Popen(
            [browser, *FLAGS, f"--user-data-dir={profile}", address], stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def serving(site: Site) -> Iterator[None]:
    thread = threading.Thread(target=site.serve_forever, daemon=True)
    thread.start()
    yield
    site.shutdown()
    site.server_close()
    thread.join()


@pytest.mark.slow
def test_a_browser_says_what_python_says(browser: str, runtime: Path, student: Path, tmp_path: Path) -> None:
    rows = load_tokenizer(str(student))([TEXT, "ga"], padding=True)  # the second is mostly padding
    asked = {"files": [str(ONNX), str(FILES["int8"])], "ids": rows["input_ids"], "mask": rows["attention_mask"]}
    site = Site(student, runtime, asked)
    with serving(site), open_page(browser, site, tmp_path / "profile"):
        said = site.said.get(timeout=120)
    assert "error" not in said, said["error"]
    inputs = Inputs(torch.tensor(asked["ids"]), torch.tensor(asked["mask"]).bool())
    files = {name: OnnxModel(student / name, 1, "classification") for name in asked["files"]}
    expected = {name: file.outputs(inputs)[0].numpy() for name, file in files.items()}
    made = {name: np.array(said[name]["logits"], np.float32).reshape(said[name]["shape"]) for name in asked["files"]}
    np.testing.assert_allclose(made[str(ONNX)], expected[str(ONNX)], rtol=0, atol=1e-4)
    # Sums of products of 8 bits are whole numbers everywhere, but an activation may round to the next one; however it
    # does, the file is nearer to itself than to the one in 32 bits.
    apart = np.abs(expected[str(ONNX)] - expected[str(FILES["int8"])]).max()
    assert np.abs(made[str(FILES["int8"])] - expected[str(FILES["int8"])]).max() < apart / 2
