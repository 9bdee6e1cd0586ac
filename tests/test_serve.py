"""Serving: the same numbers as the model, a typed answer for every bad request, nothing left after the end."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from raydistil.serve.app import build_api
from raydistil.serve.model import load
from raydistil.serve.schema import MAX_BODY_BYTES, MAX_INPUTS, MAX_MASKS
from raydistil.serve.source import find
from raydistil.types import Task

POSITIONS = tiny.SHAPE["max_position_embeddings"]
LONG = "ba " * 100  # every word is one token
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def filler(filler_dir: Path) -> TestClient:
    return TestClient(build_api(load(find(filler_dir))), raise_server_exceptions=False)


def direct_logits(path: Path, text: str, loader: Any) -> torch.Tensor:
    """Logits by transformers alone, for one text that is not padded."""
    from transformers import AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt")
    with torch.inference_mode():
        return loader.from_pretrained(path).eval()(**inputs).logits[0]


# ---- answers


def test_class_scores_are_the_softmax_of_the_models_logits(classifier: TestClient, classifier_run: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    texts = ["ba", "ca du fe ho", "unknown words and ba"]
    together = classifier.post("/v1/classify", json={"inputs": texts}).json()
    assert together["model"] == "topics"
    for text, padded in zip(texts, together["results"], strict=True):
        logits_C = direct_logits(classifier_run / "student", text, AutoModelForSequenceClassification)
        expected = dict(zip(tiny.LABELS, logits_C.softmax(-1).tolist(), strict=True))
        alone = classifier.post("/v1/classify", json={"inputs": text}).json()["results"][0]
        for result in (alone, padded):
            assert {s["label"]: s["score"] for s in result["scores"]} == pytest.approx(expected, abs=1e-6)
            assert result["label"] == max(expected, key=expected.__getitem__)
            assert result["score"] == result["scores"][0]["score"]


def test_top_k_lists_the_best_labels_in_order(classifier: TestClient) -> None:
    ask = {"inputs": "ba ca"}
    every = classifier.post("/v1/classify", json=ask).json()["results"][0]["scores"]
    two = classifier.post("/v1/classify", json=ask | {"top_k": 2}).json()["results"][0]["scores"]
    many = classifier.post("/v1/classify", json=ask | {"top_k": 10**30}).json()["results"][0]["scores"]
    assert len(every) == len(tiny.LABELS) and every == sorted(every, key=lambda s: -s["score"])
    assert two == every[:2] and many == every


def test_mask_candidates_are_the_softmax_at_each_mask(filler: TestClient, filler_dir: Path) -> None:
    from transformers import AutoModelForMaskedLM

    texts = ["ba [MASK] du [MASK] fe ho", "[MASK]"]
    results = filler.post("/v1/fill-mask", json={"inputs": texts}).json()["results"]
    assert [len(result["masks"]) for result in results] == [2, 1]
    for text, result in zip(texts, results, strict=True):
        scores_LV = direct_logits(filler_dir, text, AutoModelForMaskedLM).softmax(-1)
        places = [place for place, word in enumerate(["[CLS]", *text.split()]) if word == "[MASK]"]
        for place, mask in zip(places, result["masks"], strict=True):
            best = scores_LV[place].topk(5)
            assert [c["score"] for c in mask["candidates"]] == pytest.approx(best.values.tolist(), abs=1e-6)
            assert [c["token"] for c in mask["candidates"]] == tiny.tokenizer().convert_ids_to_tokens(best.indices)


@pytest.mark.parametrize(("family", "reserved"), [("bert", 0), ("roberta", 2), ("mpnet", 2)])
@pytest.mark.parametrize("task", ["classification", "mlm"])
def test_long_texts_are_cut_to_what_the_model_takes(tmp_path: Path, family: str, reserved: int, task: Task) -> None:
    most = POSITIONS - reserved
    client = TestClient(build_api(load(find(tiny.write_model(tmp_path / "model", task, family)))))
    route = "/v1/classify" if task == "classification" else "/v1/fill-mask"
    results = client.post(route, json={"inputs": ["[MASK] " + LONG, "[MASK]"]}).json()["results"]
    assert [(result["tokens"], result["truncated"]) for result in results] == [(most, True), (3, False)]
    assert client.get("/info").json()["max_length"] == most
    refused = client.post(route, json={"inputs": ["[MASK]", "[MASK] " + LONG], "truncate": "error"})
    assert (refused.status_code, refused.json()["error"]) == (
        422,
        {
            "type": "too_long", "message": f"expected at most {most} tokens, got 103", "param": "inputs[1]",
            "limit": most,
        },
    )  # fmt: skip


def test_info_states_the_model_and_what_was_measured(classifier: TestClient, filler: TestClient) -> None:
    info = classifier.get("/info").json()
    assert info["parameters"] > 0
    assert {key: info[key] for key in ("model", "task", "labels", "mask_token", "max_length", "report")} == {
        "model": "topics", "task": "classification", "labels": list(tiny.LABELS), "mask_token": None,
        "max_length": POSITIONS, "report": {"retention": 0.98},
    }  # fmt: skip
    other = filler.get("/info").json()
    assert (other["task"], other["labels"], other["mask_token"], other["report"]) == ("mlm", None, "[MASK]", None)


def test_state_and_docs_answer(classifier: TestClient) -> None:
    assert classifier.get("/livez").json() == classifier.get("/readyz").json() == {"status": "ok"}
    assert classifier.get("/docs").status_code == 200
    paths = classifier.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/v1/classify", "/v1/models", "/livez", "/readyz", "/info", "/metrics"}
    assert set(paths["/v1/classify"]["post"]["responses"]) == {
        "200", "400", "413", "422", "429", "500", "503", "504",
    }  # fmt: skip


def test_requests_at_the_same_time_do_not_mix(classifier: TestClient) -> None:
    """One batch holds texts of many; each is answered as it is alone."""
    texts = [["ba"], ["ca du", LONG], ["fe ho ba ca du"], ["ba " * 9, "ca"]] * 4
    with classifier as client, ThreadPoolExecutor(8) as pool:
        ask = partial(client.post, "/v1/classify")
        together = list(pool.map(lambda text: ask(json={"inputs": text}).json()["results"], texts))
        alone = [[ask(json={"inputs": text}).json()["results"][0] for text in each] for each in texts]
    for many, singles in zip(together, alone, strict=True):
        for one, other in zip(many, singles, strict=True):
            assert one["label"] == other["label"] and one["tokens"] == other["tokens"]
            assert one["score"] == pytest.approx(other["score"], abs=1e-6)


def test_replies_say_where_the_time_went(classifier: TestClient) -> None:
    headers = classifier.post("/v1/classify", json={"inputs": ["ba ca", "du"]}).headers
    assert all(float(headers[f"x-{part}-time"]) >= 0 for part in ("tokenization", "queue", "inference"))
    assert headers["x-compute-tokens"] == str(2 + 2 + 1 + 2)


def test_raw_scores_are_logits(classifier: TestClient) -> None:
    asked = {"inputs": "ba ca du"}
    raw, shares = (
        classifier.post("/v1/classify", json=asked | {"raw": raw}).json()["results"][0]["scores"]
        for raw in (True, False)
    )
    powers = [math.exp(each["score"]) for each in raw]
    assert [each["score"] for each in shares] == pytest.approx([power / sum(powers) for power in powers], abs=1e-6)
    assert [each["label"] for each in raw] == [each["label"] for each in shares]


def test_a_text_can_lose_its_beginning(filler: TestClient) -> None:
    reply = filler.post("/v1/fill-mask", json={"inputs": LONG + "[MASK]", "truncate": "left"}).json()["results"][0]
    assert reply["truncated"] and reply["tokens"] == POSITIONS and len(reply["masks"]) == 1


# ---- refusals

MALFORMED = [b"", b"{", b'{"inputs": "a"', b"\xff\xfe", b'{"inputs": "\xff"}', b'{"inputs": ' + b"[" * 200_000]
UNSUITABLE = [
    (b"[]", "wrong_type", None),
    (b'"ba"', "wrong_type", None),
    (b"{}", "missing_field", "inputs"),
    (b'{"inputs": null}', "wrong_type", "inputs"),
    (b'{"inputs": 5}', "wrong_type", "inputs"),
    (b'{"inputs": {"text": "ba"}}', "missing_field", "inputs[0].text_pair"),
    (b'{"inputs": ["ba", 5]}', "wrong_type", "inputs[1]"),
    (b'{"inputs": ["ba", ["ca"]]}', "wrong_type", "inputs[1]"),
    (b'{"inputs": []}', "empty_input", "inputs"),
    (b'{"inputs": ""}', "empty_input", "inputs[0]"),
    (b'{"inputs": ["ba", " \\n\\t"]}', "empty_input", "inputs[1]"),
    (b'{"inputs": "\\ud800"}', "invalid_value", "inputs[0]"),
    (b'{"inputs": "ba", "topk": 1}', "unknown_field", "topk"),
    (b'{"inputs": "ba", "\\ud800": 1}', "wrong_type", None),
    (b'{"inputs": "ba", "top_k": "1"}', "wrong_type", "top_k"),
    (b'{"inputs": "ba", "top_k": true}', "wrong_type", "top_k"),
    (b'{"inputs": "ba", "top_k": 1.5}', "wrong_type", "top_k"),
    (b'{"inputs": "ba", "top_k": NaN}', "wrong_type", "top_k"),
    (b'{"inputs": "ba", "top_k": 0}', "invalid_value", "top_k"),
    (b'{"inputs": "ba", "truncate": "middle"}', "invalid_value", "truncate"),
    (b'{"inputs": "ba", "truncate": null}', "invalid_value", "truncate"),
]


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: repr(body[:20]))
def test_what_is_not_json_is_400(classifier: TestClient, body: bytes) -> None:
    response = classifier.post("/v1/classify", content=body, headers=JSON)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "malformed_json")


@pytest.mark.parametrize(("body", "type_", "param"), UNSUITABLE, ids=lambda value: repr(value)[:40])
def test_what_cannot_be_answered_is_422_and_names_the_field(
    classifier: TestClient, body: bytes, type_: str, param: str | None
) -> None:
    response = classifier.post("/v1/classify", content=body, headers=JSON)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (422, type_, param)
    assert set(error) == {"type", "message", "param", "limit"} and error["message"]


def test_other_content_types_are_told_what_to_send(classifier: TestClient) -> None:
    response = classifier.post("/v1/classify", content=b'{"inputs": "ba"}', headers={"content-type": "text/plain"})
    assert response.status_code == 422
    assert "content-type: application/json" in response.json()["error"]["message"]


def test_limits_hold_exactly(classifier: TestClient) -> None:
    def ask(body: bytes) -> tuple[int, Any]:
        response = classifier.post("/v1/classify", content=body, headers=JSON)
        return response.status_code, response.json().get("error", {"limit": None})["limit"]

    frame = b'{"inputs": "%s"}'
    room = MAX_BODY_BYTES - len(frame % b"")
    assert ask(frame % (b"x" * room)) == (200, None)
    assert ask(frame % (b"x" * (room + 1))) == (413, MAX_BODY_BYTES)
    assert ask(json.dumps({"inputs": ["ba"] * MAX_INPUTS}).encode()) == (200, None)
    assert ask(json.dumps({"inputs": ["ba"] * (MAX_INPUTS + 1)}).encode()) == (413, MAX_INPUTS)


@pytest.mark.parametrize(
    ("body", "status", "type_", "param"),
    [
        ({"inputs": ["[MASK]", "ba"]}, 422, "no_mask", "inputs[1]"),
        ({"inputs": LONG + "[MASK]"}, 422, "too_long", "inputs[0]"),
        ({"inputs": "[MASK] " + LONG + "[MASK]"}, 422, "too_long", "inputs[0]"),
        ({"inputs": "[MASK] " + LONG * 100 + "[MASK]"}, 422, "too_long", "inputs[0]"),
        ({"inputs": ["[MASK] " * 30] * (MAX_MASKS // 30 + 1)}, 413, "too_many_masks", "inputs"),
        ({"inputs": "[MASK]", "top_k": 101}, 422, "invalid_value", "top_k"),
        ({"inputs": "[MASK]", "top_k": None}, 422, "wrong_type", "top_k"),
    ],
)
def test_masks_that_cannot_be_filled_are_refused(
    filler: TestClient, body: dict[str, Any], status: int, type_: str, param: str
) -> None:
    response = filler.post("/v1/fill-mask", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (status, type_, param)


def test_the_other_tasks_route_names_the_right_one(classifier: TestClient, filler: TestClient) -> None:
    for client, asked, right in ((classifier, "fill-mask", "classify"), (filler, "classify", "fill-mask")):
        response = client.post(f"/v1/{asked}", json={"inputs": "[MASK]"})
        assert (response.status_code, response.json()["error"]["type"]) == (404, "wrong_task")
        assert f"POST /v1/{right}" in response.json()["error"]["message"]


def test_unknown_routes_and_methods_are_typed(classifier: TestClient) -> None:
    assert classifier.get("/v2/classify").json()["error"]["type"] == "not_found"
    response = classifier.get("/v1/classify")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["type"] == "method_not_allowed"


KEYS = st.text(st.characters(), max_size=9)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
OPTIONAL = {"top_k": VALUES, "truncate": VALUES, "more": VALUES}
BODIES = VALUES | st.fixed_dictionaries({"inputs": VALUES}, optional=OPTIONAL)


@given(body=BODIES)
def test_no_body_is_answered_with_a_failure(classifier: TestClient, filler: TestClient, body: Any) -> None:
    for client, route in ((classifier, "/v1/classify"), (filler, "/v1/fill-mask")):
        response = client.post(route, content=json.dumps(body).encode(), headers=JSON)
        assert response.status_code in (200, 400, 413, 422)
        assert response.status_code == 200 or set(response.json()) == {"error"}
