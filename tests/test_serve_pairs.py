"""Pairs of texts at /v1/classify: joined as in training, cut as in training, refused by the name of the field."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MINILM
from fastapi.testclient import TestClient
from made import write_teacher
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from raydistil.models import load_tokenizer
from raydistil.serve.app import build_api
from raydistil.serve.model import load
from raydistil.serve.run import example
from raydistil.serve.source import find
from raydistil.serve.texts import Reader

PAIR = {"text": "the metal is iron", "text_pair": "it is near the danube, or so they say"}
TEXT = "the fruit is apple"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_teacher(tmp_path_factory.mktemp("served") / "pairs", "classification"))


@pytest.fixture(scope="module")
def client(folder: Path) -> TestClient:
    return TestClient(build_api(load(find(folder))), raise_server_exceptions=False)


def expected(folder: Path, *texts: str) -> list[float]:
    """Probabilities, in the order of the labels."""
    given = AutoTokenizer.from_pretrained(folder)(*texts, return_tensors="pt")
    with torch.inference_mode():
        logits = AutoModelForSequenceClassification.from_pretrained(folder).eval()(**given).logits[0]
    found: list[float] = logits.softmax(-1).tolist()
    return found


def said(result: dict[str, Any]) -> list[float]:
    return [each["score"] for each in sorted(result["scores"], key=lambda each: each["label"])]


def test_pairs_and_texts_come_in_one_list(client: TestClient, folder: Path) -> None:
    reply = client.post("/v1/classify", json={"inputs": [PAIR, TEXT, PAIR]})
    assert reply.status_code == 200, reply.text
    first, alone, again = reply.json()["results"]
    assert said(first) == pytest.approx(expected(folder, *PAIR.values()), abs=1e-5)
    assert said(alone) == pytest.approx(expected(folder, TEXT), abs=1e-5)
    assert again == first
    (one,) = client.post("/v1/classify", json={"inputs": PAIR}).json()["results"]
    assert said(one) == pytest.approx(said(first), abs=1e-6)
    assert one["tokens"] == len(load_tokenizer(MINILM)(*PAIR.values())["input_ids"]) and not one["truncated"]


def test_the_longer_text_is_cut_first_at_either_end(client: TestClient, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for side in ("right", "left"):
        tokenizer.truncation_side = side
        long = {"text": "iron and copper", "text_pair": " ".join(f"tin {n} zinc" for n in range(60))}
        given = tokenizer(*long.values(), truncation=True, max_length=64)["input_ids"]
        (row,) = Reader(load_tokenizer(MINILM), 64).inputs([(long["text"], long["text_pair"])], side)
        assert row.ids.tolist() == given and row.is_cut
        (result,) = client.post("/v1/classify", json={"inputs": long, "truncate": side}).json()["results"]
        assert result["truncated"] and result["tokens"] == 64
    reply = client.post("/v1/classify", json={"inputs": [TEXT, long], "truncate": "error"})
    assert reply.status_code == 422 and reply.json()["error"]["type"] == "too_long"
    assert reply.json()["error"]["param"] == "inputs[1]" and reply.json()["error"]["limit"] == 64


def test_texts_beyond_what_is_read_are_cut_without_being_read() -> None:
    (row,) = Reader(load_tokenizer(MINILM), 32).inputs([("iron " * 10**5, "tin " * 10**5)], "right")
    assert len(row.ids) == 32 and row.is_cut and row.context == 2 + (32 - 3) // 2


@pytest.mark.parametrize(
    ("item", "type_", "param"),
    [
        ({"text": "a"}, "missing_field", "inputs[1].text_pair"),
        ({"text": "a", "text_pair": " "}, "empty_input", "inputs[1].text_pair"),
        ({"text": "a", "text_pair": 3}, "wrong_type", "inputs[1].text_pair"),
        (PAIR | {"third": "c"}, "unknown_field", "inputs[1].third"),
        (["a", "b"], "wrong_type", "inputs[1]"),
        (" ", "empty_input", "inputs[1]"),
    ],
)
def test_what_is_no_pair_is_refused(client: TestClient, item: Any, type_: str, param: str) -> None:
    reply = client.post("/v1/classify", json={"inputs": [TEXT, item]})
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["param"]) == (422, type_, param)


def test_the_command_to_paste_has_what_the_model_takes(folder: Path) -> None:
    source = find(folder)
    assert '"inputs": "' in example(source, "http://here")
    (folder / "raydistil.json").write_text('{"pairs": true}')
    assert '"text_pair": "' in example(find(folder), "http://here")
    (folder / "raydistil.json").unlink()
