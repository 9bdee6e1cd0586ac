"""The page at `/` in a real browser: it asks the model by itself and shows what it says."""

import json
import os
import subprocess
from pathlib import Path
from urllib.parse import urlencode

import pytest
import test_browser
import tiny
from served import running, student

from raydistil.serve.app import build_api
from raydistil.serve.model import load
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


@pytest.mark.parametrize("pairs", [False, True])
def test_a_page_of_pairs_has_a_place_for_each_text(browser: str, tmp_path: Path, pairs: bool) -> None:
    folder = student(tmp_path, "classification")
    (folder / "raydistil.json").write_text(json.dumps({"pairs": pairs}))
    with running(build_api(load(find(folder)))) as url:
        command = [
            browser, *test_browser.FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
            "--dump-dom", f"{url}/?{urlencode({'text': TEXT, 'text_pair': 'ga'})}",
        ]  # fmt: skip
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert ('id="text_pair"' in shown) == pairs
    assert f"<td>{tiny.LABELS[0]}</td>" in shown and 'class="wrong"' not in shown


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
