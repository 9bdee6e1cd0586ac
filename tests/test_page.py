"""The page at `/` in a real browser: it asks the model by itself and shows what it says."""

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import test_browser
import tiny
import uvicorn

from raydistil.serve.app import build_api
from raydistil.serve.model import load
from raydistil.serve.ports import free_port
from raydistil.serve.source import find
from raydistil.types import Task

browser = test_browser.browser
pytestmark = pytest.mark.slow
TEXT = "ba ca du fe ho"
GIVEN: dict[Task, dict[str, str]] = {
    "classification": {"text": TEXT}, "token_classification": {"text": "ba 🙂 ca du fe ho"},
    "question_answering": {"question": "ba", "context": TEXT}, "embedding": {"text": TEXT, "other": "ga"},
    "mlm": {"text": "ba [MASK] du"},
}  # fmt: skip


@contextmanager
def running(app: Any) -> Iterator[str]:
    port = free_port("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def student(folder: Path, task: Task) -> Path:
    path = tiny.write_model(folder / "topics", task)
    if task == "embedding":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"pooling": "mean"}))
    return path


@pytest.mark.parametrize("task", list(GIVEN))
def test_a_link_with_a_text_shows_what_the_model_says(browser: str, tmp_path: Path, task: Task) -> None:
    model = load(find(student(tmp_path, task)))
    picture = Path(os.environ.get("RAYDISTIL_PICTURES", str(tmp_path))) / f"page-{task}.png"
    with running(build_api(model)) as url:
        command = [
            browser, *test_browser.FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
            "--window-size=800,900", f"--screenshot={picture}", "--dump-dom", f"{url}/?{urlencode(GIVEN[task])}",
        ]  # fmt: skip
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert 'class="wrong"' not in shown and "inference" in shown and ">topics<" in shown
    result = shown.partition('id="result"')[2].partition("</div>\n<p")[0]
    expected = {
        "classification": [f"<td>{label}</td>" for label in tiny.LABELS],
        "token_classification": ["<mark>ba<small>LABEL_", "<mark>🙂<small>LABEL_"],
        "question_answering": ["<mark>", "<small>"], "embedding": ["Cosine of the two: "], "mlm": 5 * ["<tr>"],
    }  # fmt: skip
    for part in expected[task]:
        assert part in result
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
