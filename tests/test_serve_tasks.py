"""Routes for words, questions and vectors; what a full queue, a stopping server and a failing model answer."""

import base64
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MINILM
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from made import HEADS, TAGS, write_teacher
from transformers import AutoModel, AutoModelForQuestionAnswering, AutoModelForTokenClassification, AutoTokenizer

from raydistil.models import load_tokenizer
from raydistil.scores.entities import entities
from raydistil.serve.app import build_api
from raydistil.serve.backends import Row
from raydistil.serve.model import ServedModel, load
from raydistil.serve.schema import ROUTES
from raydistil.serve.source import find
from raydistil.serve.texts import Reader, words
from raydistil.types import Task

TEXT = "Iron, near the danube: copper & tin is Nickel-plated."
CONTEXT = "item 3: nothing more and the fruit is apple and the metal is iron, or so they say. " * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Path]:
    folder = tmp_path_factory.mktemp("served")
    return {task: Path(write_teacher(folder / task, task)) for task in HEADS}


@pytest.fixture(scope="module")
def models(folders: dict[Task, Path]) -> dict[Task, ServedModel]:
    for task, folder in folders.items():
        if task == "embedding":  # as an exported student has it
            (folder / "1_Pooling").mkdir()
            (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return {task: load(find(folder)) for task, folder in folders.items()}


@pytest.fixture(scope="module")
def clients(models: dict[Task, ServedModel]) -> dict[Task, TestClient]:
    return {task: TestClient(build_api(model), raise_server_exceptions=False) for task, model in models.items()}


# ---- what is found


def test_entities_are_those_of_the_first_tokens_of_words(
    clients: dict[Task, TestClient], folders: dict[Task, Path]
) -> None:
    folder = folders["token_classification"]
    reply = clients["token_classification"].post("/v1/tokens/classify", json={"inputs": [TEXT, "tin"]}).json()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer(TEXT, return_tensors="pt", return_offsets_mapping=True)
    places = given.pop("offset_mapping")[0].tolist()
    with torch.inference_mode():
        shares = AutoModelForTokenClassification.from_pretrained(folder).eval()(**given).logits[0].softmax(-1)
    starts = {match.start() for match in re.finditer(r"\w+|[^\w\s]", TEXT)}
    firsts = [n for n, (start, end) in enumerate(places) if end > start and start in starts]
    tags = [TAGS[int(shares[n].argmax())] for n in firsts]
    found = [(kind, firsts[first], firsts[end - 1]) for first, end, kind in sorted(entities(tags))]
    said = reply["results"][0]["entities"]
    assert [each["label"] for each in said] == [kind for kind, _, _ in found] and said
    for each, (_, first, last) in zip(said, found, strict=True):
        assert each["start"] == places[first][0] and each["end"] >= places[last][1]
        assert each["text"] == TEXT[each["start"] : each["end"]] and 0 < each["score"] <= 1


def test_answers_are_the_best_spans_of_all_windows(clients: dict[Task, TestClient], folders: dict[Task, Path]) -> None:
    folder, question = folders["question_answering"], "which metal is it?"
    asked = {"question": question, "context": CONTEXT, "top_k": 3}
    reply = clients["question_answering"].post("/v1/answer", json=asked).json()
    assert reply["windows"] > 1 and len(reply["answers"]) == 3
    scores = [each["score"] for each in reply["answers"]]
    assert scores == sorted(scores, reverse=True)
    for each in reply["answers"]:
        assert each["text"] == CONTEXT[each["start"] : each["end"]] != ""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer(
        question, CONTEXT, return_tensors="pt", max_length=64, stride=16, truncation="only_second", padding=True,
        return_overflowing_tokens=True,
    )  # fmt: skip
    given.pop("overflow_to_sample_mapping", None)
    inside = torch.tensor([[part == 1 for part in given.sequence_ids(n)] for n in range(len(given["input_ids"]))])
    with torch.inference_mode():
        out = AutoModelForQuestionAnswering.from_pretrained(folder).eval()(**given)
    pairs = out.start_logits[:, :, None] + out.end_logits[:, None, :]
    allowed = (inside[:, :, None] & inside[:, None, :]).triu() & ~torch.ones_like(pairs[0]).triu(30).bool()
    assert scores[0] == pytest.approx(pairs[allowed].max().item(), abs=1e-4)
    assert reply["lacking"] == pytest.approx((out.start_logits + out.end_logits)[:, 0].min().item(), abs=1e-4)


def test_a_context_may_be_long_but_not_endless(clients: dict[Task, TestClient]) -> None:
    client, question = clients["question_answering"], "which metal is it? " * 20
    reply = client.post("/v1/answer", json={"question": question, "context": "iron"}).json()
    assert reply["truncated"] and reply["windows"] == 1
    reply = client.post("/v1/answer", json={"question": "which?", "context": CONTEXT * 100})
    assert (reply.status_code, reply.json()["error"]["type"], reply.json()["error"]["limit"]) == (413, "too_long", 64)


def test_vectors_are_the_models_in_openais_form(clients: dict[Task, TestClient], folders: dict[Task, Path]) -> None:
    client, texts = clients["embedding"], ["iron and tin", "the danube", "apple " * 200]
    reply = client.post("/v1/embeddings", json={"input": texts, "model": "any"}).json()
    coded = client.post("/v1/embeddings", json={"input": texts, "encoding_format": "base64"}).json()
    assert [each["index"] for each in reply["data"]] == [0, 1, 2] and reply["object"] == "list"
    assert reply["truncated"] == [False, False, True]
    tokenizer, model = (kind.from_pretrained(folders["embedding"]) for kind in (AutoTokenizer, AutoModel))
    given = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=64)
    with torch.inference_mode():
        states = model(**given).last_hidden_state
    mask = given["attention_mask"][:, :, None]
    expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    for each, other, vector in zip(reply["data"], coded["data"], expected, strict=True):
        np.testing.assert_allclose(each["embedding"], vector, atol=1e-5)
        assert np.frombuffer(base64.b64decode(other["embedding"]), "<f4").tolist() == pytest.approx(each["embedding"])
    assert reply["usage"]["total_tokens"] == int(given["attention_mask"].sum())
    assert client.get("/v1/models").json()["data"][0]["object"] == "model"


def test_each_route_names_the_one_that_is_there(clients: dict[Task, TestClient]) -> None:
    for task, client in clients.items():
        for other, route in ROUTES.items():
            reply = client.post(route, json={})
            assert reply.status_code == (422 if other == task else 404)
            assert other == task or f"POST {ROUTES[task]}" in reply.json()["error"]["message"]


# ---- reading


@given(st.text(st.characters(codec="utf-8"), max_size=60), st.sampled_from(["right", "left"]))
def test_tokens_stand_where_they_are_said_to(text: str, truncate: Any) -> None:
    """Cut or not, from whichever end; a word's place holds its first token's."""
    tokenizer = load_tokenizer(MINILM)
    (row,) = Reader(tokenizer, 12).texts([text], truncate)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    kept = whole[-10:] if truncate == "left" else whole[:10]
    assert row.ids.tolist() == [tokenizer.cls_token_id, *kept, tokenizer.sep_token_id]
    assert len(row.cut_ids) == max(0, len(whole) - 10)
    for token, start, end in words(row.places, text):
        first = row.places[token]
        assert first[0] < end and first[1] > start


def test_a_long_text_costs_no_more_than_the_model_could_read() -> None:
    tokenizer = load_tokenizer(MINILM)
    reader = Reader(tokenizer, 12)
    right, left = (reader.texts(["a " * 10**6 + "end"], way)[0] for way in ("right", "left"))
    assert len(right.cut_ids) < 1000 > len(left.cut_ids)
    assert right.is_cut and right.unread and tokenizer.decode(left.ids[-2:-1]) == "end"
    assert left.places[-2].tolist() == [2 * 10**6, 2 * 10**6 + 3]


def test_what_little_a_long_text_holds_is_read() -> None:
    """Space is many characters and no token: what stands behind it is not dropped."""
    tokenizer = load_tokenizer(MINILM)
    for text in ("iron" + " " * 10**5 + "tin", " " * 10**5 + "iron tin"):
        for way in ("right", "left"):
            (row,) = Reader(tokenizer, 12).texts([text], way)
            assert tokenizer.decode(row.ids[1:-1]) == "iron tin" and not row.is_cut
            assert text[row.places[2][0] : row.places[2][1]] == "tin"


# ---- refusals


class Held:
    """The model's own backend, which waits until it is let go, or fails."""

    def __init__(self, model: ServedModel) -> None:
        self.free, self.entered, self.fails = threading.Event(), threading.Event(), False
        self._own, self.name = model._chosen.backend, "held"

    def run(self, rows: list[Row]) -> list[Any]:
        self.entered.set()
        assert self.free.wait(60)
        if self.fails:
            raise MemoryError
        return self._own.run(rows)


@pytest.fixture
def held(folders: dict[Task, Path], models: dict[Task, ServedModel]) -> tuple[TestClient, Held, ServedModel]:
    model = load(find(folders["token_classification"]))
    backend = Held(model)
    model._chosen = type(model._chosen)(backend, model._chosen.rows_s, {})
    return TestClient(build_api(model), raise_server_exceptions=False), backend, model


def test_a_full_queue_says_when_to_come_again(held: tuple[TestClient, Held, ServedModel]) -> None:
    """The same for one text and for many: nothing of a request is taken that is not taken whole."""
    client, backend, model = held
    model.batcher._limits = type(model.batcher._limits)(2048, 100, 0.5)
    body = {"inputs": "iron " * 60}
    with client, ThreadPoolExecutor(3) as pool:
        first = pool.submit(client.post, "/v1/tokens/classify", json=body)
        assert backend.entered.wait(60)
        second = pool.submit(client.post, "/v1/tokens/classify", json=body)
        while not model.batcher.load().items:
            pass
        for refused in ({"inputs": "tin " * 60}, {"inputs": ["tin " * 30] * 3}):
            reply = client.post("/v1/tokens/classify", json=refused)
            assert (reply.status_code, reply.json()["error"]["type"]) == (429, "overloaded")
            assert int(reply.headers["retry-after"]) >= 1
        assert client.post("/v1/tokens/classify", json={"inputs": []}).status_code == 422
        backend.free.set()
        assert first.result().status_code == second.result().status_code == 200
    assert model.batcher.load().tokens == 0


def test_what_cannot_start_in_time_is_not_waited_for(held: tuple[TestClient, Held, ServedModel]) -> None:
    client, backend, model = held
    with client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/v1/tokens/classify", json={"inputs": "iron"})
        assert backend.entered.wait(60)
        late = client.post("/v1/tokens/classify", json={"inputs": "tin"}, headers={"x-deadline-ms": "5"})
        assert (late.status_code, late.json()["error"]["type"]) == (504, "deadline_exceeded")
        assert model.batcher.load().items == 0
        backend.free.set()
        assert first.result().status_code == 200
    for wrong in ("0", "soon", "nan", "-1"):
        reply = client.post("/v1/tokens/classify", json={"inputs": "tin"}, headers={"x-deadline-ms": wrong})
        assert (reply.status_code, reply.json()["error"]["param"]) == (422, "x-deadline-ms")


def test_a_model_that_fails_once_answers_the_next(
    held: tuple[TestClient, Held, ServedModel], caplog: pytest.LogCaptureFixture
) -> None:
    client, backend, _ = held
    backend.free.set()
    backend.fails = True
    with client:
        reply = client.post("/v1/tokens/classify", json={"inputs": ["iron", "tin"]})
        error = reply.json()["error"]
        assert (reply.status_code, error["type"], error["param"]) == (500, "internal", "inputs[0]")
        assert "MemoryError" in caplog.text and "iron" not in caplog.text
        backend.fails = False
        assert client.post("/v1/tokens/classify", json={"inputs": ["iron", "tin"]}).status_code == 200


def test_a_stopping_server_takes_no_more(held: tuple[TestClient, Held, ServedModel]) -> None:
    client, backend, model = held
    backend.free.set()
    with client:
        client.portal.call(model.batcher.drain)
        reply = client.post("/v1/tokens/classify", json={"inputs": "iron"})
        assert (reply.status_code, reply.json()["error"]["type"]) == (503, "stopping")


BODIES: dict[Task, Any] = {
    "question_answering": st.fixed_dictionaries(
        {"question": st.text(max_size=30), "context": st.text(max_size=80)}, optional={"top_k": st.integers()}
    ),
    "embedding": st.fixed_dictionaries({"input": st.lists(st.text(max_size=30), max_size=3)}),
    "token_classification": st.fixed_dictionaries({"inputs": st.text(max_size=80)}),
}


@given(st.data())
def test_no_body_is_answered_with_a_failure(clients: dict[Task, TestClient], data: st.DataObject) -> None:
    for task, client in clients.items():
        reply = client.post(ROUTES[task], json=data.draw(BODIES[task] | st.none() | st.text(max_size=3)))
        assert reply.status_code in (200, 400, 413, 422), reply.text
