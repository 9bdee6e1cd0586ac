"""The benchmarks themselves, on little work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import sentences
from served import running, student

from raydistil.bench.fidelity import DEFAULTS, ROWS, bench_fidelity, config_for
from raydistil.bench.losses import bench_losses
from raydistil.bench.serve import SHARES
from raydistil.cli import _guarded
from raydistil.errors import DataError
from raydistil.processor import flags, multiplies_bfloat16
from raydistil.serve.app import build_api
from raydistil.serve.model import load
from raydistil.serve.source import find
from raydistil.types import Task

emulated = pytest.mark.skipif(
    not multiplies_bfloat16(flags()), reason="bfloat16 is emulated on this processor: it would take half an hour"
)


def write_splits(folder: Path) -> Path:
    rows = sentences(120)
    for split, part in (("train", rows[:80]), ("validation", rows[80:100]), ("test", rows[100:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@emulated
@pytest.mark.long
def test_losses_agree_and_the_chunked_pass_takes_a_third_of_the_memory(one_thread: None) -> None:
    result = bench_losses((384,), 2048, 30522, 1, 1, lambda line: None)
    exact, rough = result["rows"]
    assert (exact["precision"], rough["precision"]) == ("float32", "bfloat16")
    assert exact["gradient_error"] < 1e-5 < rough["gradient_error"] < 0.05
    assert max(exact["memory_share"], rough["memory_share"]) <= 1 / 3


def test_every_row_is_a_configuration_of_its_own(tmp_path: Path) -> None:
    names = {config_for(tmp_path, tmp_path, row, seed).name for row in ROWS for seed in (0, 1)}
    assert len(names) == 2 * len(ROWS)
    assert len(dict.fromkeys(ROWS)) == len(ROWS)


@pytest.mark.long
def test_scale_on_nodes_of_its_own(tmp_path: Path) -> None:
    """In a process of its own, since this one has a cluster: teachers on every node that is theirs, none elsewhere."""
    counts = [f"--teachers={count}" for count in (1, 3)]
    asked = ["bench", "scale", *counts, "--seconds", "8", "--output", str(tmp_path), "--json"]
    done = subprocess.run([sys.executable, "-m", "raydistil", *asked], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    *fixed, grown = result["rows"]
    assert [(row["teachers_used"], row["teacher_nodes"]) for row in fixed] == [(1, 1), (3, 3)]
    assert 1 < grown["teachers_used"] <= 3 and (grown["fewest"], grown["teachers"]) == (1, 3)
    assert {row["binds"] for row in result["rows"]} == {"teacher"}
    assert result["driver_payload_bytes"] == 0
    assert [row["gpus"] for row in result["paper"]] == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert all(row["teachers"] + row["students"] == row["gpus"] for row in result["paper"])


@emulated
@pytest.mark.long
def test_the_stream_beside_its_loops(tmp_path: Path) -> None:
    """The structure of it: one teacher, no data through the driver, little in the store, like numbers of rows."""
    asked = ["--rounds=1", "--texts=320", "--steps=1", "--warm-up=4", "--output", str(tmp_path), "--json"]
    command = [sys.executable, "-m", "raydistil", "bench", "stream", *asked]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert [row["precision"] for row in result["rows"]] == ["float32", "bfloat16"]
    assert result["driver_payload_bytes"] == 0 < result["payload_control_bytes"]
    assert result["teacher_builds"] == 1
    assert 768 < result["wire_bytes_per_token"] <= 776 * 1.05
    assert 0 < result["peak_store_bytes"] < 256 << 20
    for row in result["rows"]:
        assert all(stream["window"]["teacher_rows"] > 0 for stream in row["streams"])
        assert {"ratio_vs_inprocess", "ratio_vs_student_only", "roofline_fraction", "wait_fraction"} <= row.keys()


def test_data_without_a_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected train.jsonl \(text, label\)"):
        bench_fidelity(tmp_path, tmp_path, 1, True, lambda line: None)


@pytest.mark.long
def test_the_default_recipe_from_the_fine_tuning_to_the_table(ray_cluster: None, tmp_path: Path) -> None:
    data, said = write_splits(tmp_path), list[str]()
    result = bench_fidelity(data, tmp_path / "runs", 1, True, said.append)
    assert len(said) == len(DEFAULTS) == len(result["rows"])
    assert result["default_retention_3"] == result["rows"][0]["test_retention"]["mean"] > 0
    assert 0 < result["teacher_score"] <= 1
    assert (result["default_recipe"]["epochs"], result["default_recipe"]["start"]) == (6, "checkpoint")
    again = list[str]()
    assert bench_fidelity(data, tmp_path / "runs", 1, True, again.append) == result
    assert again == []


@pytest.mark.long
def test_serve_beside_others_and_a_peer(tmp_path: Path) -> None:
    """Every server says what it was asked; embeddings, so that another server of them can stand beside."""
    folder = student(tmp_path, "embedding")
    with running(build_api(load(find(folder)))) as url:
        asked = ["bench", "serve", str(folder), "--rounds", "1", "--seconds", "1", "--soak", "10", "--backend", "torch"]
        more = ["--peer", f"{url}/v1/embeddings", "--output", str(tmp_path / "out"), "--json"]
        done = subprocess.run([sys.executable, "-m", "raydistil", *asked, *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert list(result["arms"]) == ["raydistil", "serve.batch", "fastapi", "peer"]
    for arm in result["arms"].values():
        assert [rate["share"] for rate in arm["rates"]] == list(SHARES) and arm["saturation_rps"] > 0
        assert arm["rates"][0]["served"] > 0 and arm["rates"][0]["errors_5xx"] == 0
    assert result["rates"] == result["arms"]["raydistil"]["rates"]
    assert result["ratio_vs_fastapi"] == result["saturation_rps"] / result["arms"]["fastapi"]["saturation_rps"]
    keys = {"ratio_vs_serve_batch", "ratio_vs_peer", "overhead_p50_ms", "p99_at_2x_ms", "served_at_2x_fraction"}
    assert keys <= set(result)
    assert len(result["soak"]["replica_mib"]) == 10 and min(result["soak"]["replica_mib"]) > 200  # both processes


def test_a_model_that_cannot_be_asked_so_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[Task, list[str], str]] = [
        ("mlm", [], "classification or embedding"), ("classification", ["--peer", "x"], "embedding"),
    ]  # fmt: skip
    for task, more, wanted in cases:
        assert _guarded(["bench", "serve", str(student(tmp_path / task, task)), *more]) == 2
        assert f"expected a model of task {wanted}, got {task}" in capsys.readouterr().err
