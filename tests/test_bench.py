"""The benchmarks themselves, on little work."""

import json
from pathlib import Path

import pytest
from conftest import sentences

from raydistil.bench.fidelity import DEFAULTS, ROWS, bench_fidelity, config_for
from raydistil.bench.losses import bench_losses
from raydistil.errors import DataError


def write_splits(folder: Path) -> Path:
    rows = sentences(120)
    for split, part in (("train", rows[:80]), ("validation", rows[80:100]), ("test", rows[100:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.mark.slow
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


def test_data_without_a_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected train.jsonl \(text, label\)"):
        bench_fidelity(tmp_path, tmp_path, 1, True, lambda line: None)


@pytest.mark.slow
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
