"""What /openapi.json promises is what comes: requests of all kinds, right and wrong, that schemathesis makes of it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from served import running, student

from raydistil.serve.app import build_api
from raydistil.serve.keys import hash_of
from raydistil.serve.model import load
from raydistil.serve.source import find
from raydistil.types import Task

pytest.importorskip("schemathesis")
pytestmark = pytest.mark.slow
TASKS: tuple[Task, ...] = (
    "classification", "regression", "token_classification", "question_answering", "embedding", "mlm",
)  # fmt: skip


# A deadline of a millisecond passes, and too long a list is a 413; no schema knows the mask of a model.
CHECKS = """[checks]
not_a_server_error.expected-statuses = ["2xx", "4xx", 504]
negative_data_rejection.expected-statuses = ["4xx", 504]
positive_data_acceptance.expected-statuses = ["2xx", 413, 429, 504%s]
"""


def tried(folder: Path, url: str, task: Task, *more: str) -> subprocess.CompletedProcess[str]:
    config = folder / "schemathesis.toml"
    config.write_text(CHECKS % (", 422" if task == "mlm" else ""))
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", f"{url}/openapi.json",
        "--checks", "all", "--seed", "0", "--max-examples", "60", "--generation-database", "none", "--no-color", *more,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)


@pytest.mark.parametrize("task", TASKS)
def test_no_request_breaks_the_server_or_its_promises(tmp_path: Path, task: Task) -> None:
    with running(build_api(load(find(student(tmp_path, task))))) as url:
        done = tried(tmp_path, url, task)
    assert done.returncode == 0, done.stdout[-4000:]


def test_nor_where_a_key_is_needed(tmp_path: Path) -> None:
    source = replace(find(student(tmp_path, "classification")), keys=(("ada", hash_of("secret"), None),))
    with running(build_api(load(source))) as url:
        done = tried(tmp_path, url, "classification", "--header", "authorization: Bearer secret")
    assert done.returncode == 0, done.stdout[-4000:]
