"""Before the app: API keys, their limits, and the counts at /metrics."""

import asyncio
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from raydistil.cli import _guarded
from raydistil.errors import ConfigError, StorageError
from raydistil.serve import keys as keeping
from raydistil.serve import metrics as measuring
from raydistil.serve.app import build_api
from raydistil.serve.batcher import Batch, Load
from raydistil.serve.gate import Counted
from raydistil.serve.keys import Key, Keys, add_key, hash_of, read_keys
from raydistil.serve.metrics import PHASES, STATUSES, Board, Meter, exposition
from raydistil.serve.model import load
from raydistil.serve.source import find

ASK = {"inputs": "ba ca"}
IDLE = Load(0, 0, 0, None, 0.0, 0.0)


def client(run: Path, **source: Any) -> TestClient:
    found = find(run)
    return TestClient(build_api(load(replace(found, **source))), raise_server_exceptions=False)


def numbers(text: str) -> dict[tuple[str, ...], float]:
    """(name, values of the labels but the replica's) -> value."""
    return {
        (sample.name, *(value for label, value in sample.labels.items() if label != "replica")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# ---- keys


def test_who_has_no_key_is_refused_and_told_how(classifier_run: Path) -> None:
    app = client(classifier_run, keys=(("ada", hash_of("secret"), None), ("bob", hash_of("other"), None)))
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}, {"authorization": ""}):
        refused = app.post("/v1/classify", json=ASK, headers=headers)
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "unauthorized")
        assert refused.headers["www-authenticate"] == "Bearer"
    for key in ("secret", "other"):
        assert app.post("/v1/classify", json=ASK, headers={"authorization": f"Bearer {key}"}).status_code == 200
    counted = numbers(app.get("/metrics", headers={"authorization": "Bearer secret"}).text)
    assert (counted["raydistil_requests_total", "401"], counted["raydistil_requests_total", "200"]) == (4, 2)
    assert [app.get(path).status_code for path in ("/", "/livez", "/readyz", "/docs", "/info", "/metrics")] == [
        200, 200, 200, 200, 401, 401,
    ]  # fmt: skip


def test_a_key_has_its_own_rate(classifier_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(keeping.time, "monotonic", lambda: now[0])
    app = client(classifier_run, keys=(("ada", hash_of("secret"), 0.5), ("bob", hash_of("other"), None)))

    def ask(key: str) -> Any:
        return app.post("/v1/classify", json=ASK, headers={"authorization": f"Bearer {key}"})

    assert [ask("secret").status_code, ask("other").status_code, ask("other").status_code] == [200, 200, 200]
    refused = ask("secret")
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limited")
    assert refused.headers["retry-after"] == "2"
    now[0] += 2
    assert [ask("secret").status_code, ask("secret").status_code] == [200, 429]


@given(st.floats(0.1, 50), st.lists(st.floats(0, 3), min_size=1, max_size=40))
def test_no_more_come_in_than_the_rate_allows(rate: float, gaps: list[float]) -> None:
    """Ever, from the start: a second's worth, and the rate times what has passed. Who is told to wait, may then."""
    now = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping.time, "monotonic", lambda: now[0])
        key, let = Key("ada", "", rate), 0
        for gap in gaps:
            now[0] += gap
            wait_s = key.wait_s()
            let += wait_s == 0
            assert let <= max(1, rate) + rate * now[0] + 1e-6
            if wait_s:
                now[0] += wait_s + 1e-9
                assert key.wait_s() == 0
                let += 1


def test_a_key_is_made_once_and_only_its_hash_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.txt"
    assert _guarded(["key", "ada", "--file", str(path)]) == 0
    made = capsys.readouterr().out.strip()
    other = add_key(path, "bob", 2.5)
    assert made not in path.read_text() and path.stat().st_mode & 0o077 == 0 and len(made) > 40
    known = Keys(read_keys(path))
    assert [(key.name, key.rate) for key in (known.owner(made), known.owner(other)) if key] == [
        ("ada", None),
        ("bob", 2.5),
    ]
    assert known.owner(path.read_text().split()[1]) is None  # the hash is no key
    assert _guarded(["key", "ada", "--file", str(path)]) == 2
    assert "expected a new name, ada has a key" in capsys.readouterr().err


@pytest.mark.parametrize("before", ["", "# ours\n", "# ours", f"bob {hash_of('b')}"])
def test_a_key_stands_in_a_line_of_its_own(tmp_path: Path, before: str) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(before)
    made = add_key(path, "ada", None)
    owner = Keys(read_keys(path)).owner(made)
    assert owner is not None and owner.name == "ada" and path.read_text().startswith(before)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected at least one API key, found none"),
        ("# nothing\n\n", "expected at least one API key, found none"),
        ("ada\n", "line 1: expected a name, the SHA-256"),
        ("ada 12ab\n", "line 1: expected a name, the SHA-256"),
        (f"ada {hash_of('a')}\nbob {hash_of('b')} fast\n", "line 2: expected a name, the SHA-256"),
        (f"ada {hash_of('a')} -1\n", "line 1: expected a name, the SHA-256"),
        (f"ada {hash_of('a')}\nada {hash_of('b')}\n", "expected a name once, got ada twice"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_keys(path)
    with pytest.raises(StorageError, match="expected API keys at"):
        read_keys(tmp_path / "none.txt")


# ---- counts


def test_who_left_is_no_failure_of_the_server(classifier_run: Path) -> None:
    model = load(find(classifier_run))

    async def left(*_: Any) -> None:
        raise asyncio.CancelledError

    scope = {"type": "http", "path": "/v1/classify", "headers": []}
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(Counted(left, model, "/v1/classify")(scope, left, left))
    counted = numbers(exposition([model.meter.families(IDLE)]).decode())
    assert (counted["raydistil_requests_total", "499"], counted["raydistil_requests_total", "500"]) == (1, 0)


def test_every_series_is_there_from_the_start_and_counts_what_was_asked(classifier_run: Path) -> None:
    app = client(classifier_run)
    first = numbers(app.get("/metrics").text)
    assert {("raydistil_requests_total", status) for status in STATUSES} <= first.keys()
    assert {("raydistil_request_seconds_count", phase) for phase in PHASES} <= first.keys()
    assert set(first.values()) == {0.0}
    words = 4 * tiny.SHAPE["max_position_embeddings"]
    assert app.post("/v1/classify", json={"inputs": ["ba", "ba " * words]}).status_code == 200
    assert app.post("/v1/classify", json={"inputs": []}).status_code == 422
    app.get("/info")
    after = numbers(app.get("/metrics").text)
    assert (after["raydistil_requests_total", "200"], after["raydistil_requests_total", "422"]) == (1, 1)
    assert after["raydistil_request_seconds_count", "total"] == 2
    assert [after["raydistil_request_seconds_count", phase] for phase in PHASES[:3]] == [1, 1, 1]
    assert after["raydistil_items_total",] == 2 and after["raydistil_truncated_total",] == 1
    assert after["raydistil_tokens_total",] == 3 + tiny.SHAPE["max_position_embeddings"]
    assert after["raydistil_busy_seconds_total",] > 0 and after["raydistil_queue_tokens",] == 0


def test_the_counts_of_all_replicas_stand_under_one_name() -> None:
    board, meters = Board(), [Meter("a"), Meter("b")]
    for count, meter in enumerate(meters, 2):
        meter.batch(Batch(count, 10 * count, 10 * count, (0.0,) * count, 0.5, 0))
        shown = board.show(str(count), meter.families(IDLE))
    text = exposition(shown).decode()
    assert text.count("# TYPE raydistil_items_total counter") == 1
    assert 'raydistil_items_total{replica="a"} 2.0' in text and 'raydistil_items_total{replica="b"} 3.0' in text
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)


def test_of_a_replica_that_is_gone_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its counts stay for a while, then nothing does."""
    now = [0.0]
    monkeypatch.setattr(measuring.time, "monotonic", lambda: now[0])
    board, waiting = Board(), Load(3, 50, 0, 100.0, 0.5, 0.0)
    assert b'queue_tokens{replica="a"} 50.0' in exposition(board.show("a", Meter("a").families(waiting)))
    for passed, gauges, counts in (
        (5, True, True),
        (measuring.GONE_S + 1, False, True),
        (measuring.KEPT_S, False, False),
    ):
        now[0] = passed
        text = exposition(board.show("b", Meter("b").families(waiting)))
        assert (b'queue_tokens{replica="a"}' in text) is gauges and (b'items_total{replica="a"}' in text) is counts
        assert b'queue_tokens{replica="b"} 50.0' in text


def test_the_dashboard_asks_for_what_there_is() -> None:
    board = json.loads((Path(__file__).parents[1] / "cluster" / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    meter = Meter("a")
    meter.beside(("teacher", "canary"), 0.9)
    there = {key[0] for key in numbers(exposition([meter.families(IDLE)]).decode())}
    for expression in asked:
        assert set(re.findall(r"raydistil_\w+", expression)) <= there
    shown = {name for expression in asked for name in re.findall(r"raydistil_\w+", expression)}
    assert {name for name in there if not name.endswith(("_count", "_sum"))} == shown
    assert set(re.findall(r'phase="(\w+)"', " ".join(asked))) == set(PHASES)
