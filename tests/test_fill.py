"""Filling the cache through Ray, and training from it with no teacher."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sentences, write_jsonl
from kept import filled, teacher_of, with_cache
from sources import CLUSTER, class_source, mlm_source, streamed
from test_pipeline import LANGUAGE_MODEL, config_for, losses, quiet

from raydistil import pipeline, rundir, wire
from raydistil.cache.layout import path_of, shards
from raydistil.cache.sizes import Sizes
from raydistil.config import Config
from raydistil.config.loss import LossConfig
from raydistil.errors import ModelError, StorageError
from raydistil.fill import Filled, fill_cache
from raydistil.models import load_model, load_tokenizer
from raydistil.specs import SourceSpec, TeacherSpec

LEAN = Sizes(1, 1)
TOKENS = 1000


def fill(source: SourceSpec, teacher: TeacherSpec, say: Any = quiet, sizes: Sizes = LEAN) -> Filled:
    assert source.caches
    return fill_cache(source.caches[0], {}, source, teacher, sizes, TOKENS, CLUSTER, say)


def contents(source: SourceSpec) -> list[bytes]:
    assert source.caches
    return [path_of(source.caches[0], shard).read_bytes() for shard in shards(source.caches[0])]


@pytest.mark.slow
def test_actors_write_what_one_process_would_and_only_once(
    ray_cluster: None, tiny_teacher: str, tmp_path: Path
) -> None:
    teacher = teacher_of(tiny_teacher, "mlm", (4,), True, LossConfig(kd_positions="all"), codec="topk", top_k=4)
    texts = replace(mlm_source(tmp_path, tiny_teacher, epochs=3), variants=2)
    alone = filled(texts, teacher, tmp_path / "alone", shard_rows=9)
    assert alone.caches
    together = replace(alone, caches=(replace(alone.caches[0], path=tmp_path / "together"),))
    said: list[str] = []
    first = fill(together, teacher, said.append)
    assert first.teacher_builds == 1
    assert first.shards_written == len(contents(together)) > 4
    assert contents(together) == contents(alone)
    assert first.num_bytes == sum(map(len, contents(together)))
    assert "teacher built 1x" in said[-1] and "bytes a token" in said[-1]
    again = fill(together, teacher, said.append)
    assert (again.shards_written, again.teacher_builds) == (0, 0)
    assert said[-1].endswith("no teacher runs")
    assert contents(together) == contents(alone)


def test_the_stream_reads_what_was_kept_and_builds_no_teacher(
    ray_cluster: None, tiny_classifier: str, tmp_path: Path
) -> None:
    teacher = teacher_of(tiny_classifier, "classification", (4,), True)
    source = filled(class_source(tmp_path, tiny_classifier), teacher, tmp_path / "kept")
    nobody = replace(teacher, model=str(tmp_path / "nobody"))
    rows = streamed(source, (nobody,))
    assert [row["index"][0].as_py() for row in rows] == list(range(source.manifest.num_micro_batches))
    assert all(row.schema == wire.schema_of(1) for row in rows)
    assert {row["teacher_0"][0].as_py() for row in rows} == {""}


def test_without_room_nothing_is_written(tiny_teacher: str, tmp_path: Path) -> None:
    teacher = teacher_of(tiny_teacher, "mlm", (4,), False)
    source = with_cache(replace(mlm_source(tmp_path, tiny_teacher), variants=1), teacher, tmp_path / "kept")
    with pytest.raises(StorageError, match=r"expected room for [\d,.]+ MiB of targets \(1,000 tokens x 1e\+15 bytes"):
        fill(source, teacher, sizes=Sizes(1e15, 0))
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.slow
def test_a_teacher_beyond_the_format_is_named(ray_cluster: None, tiny_teacher: str, tmp_path: Path) -> None:
    model = load_model(tiny_teacher, "mlm")
    with torch.no_grad():
        model.base_model.encoder.layer[3].output.LayerNorm.weight *= 1e6
    model.save_pretrained(tmp_path / "loud")
    load_tokenizer(tiny_teacher).save_pretrained(tmp_path / "loud")
    teacher = teacher_of(str(tmp_path / "loud"), "mlm", (4,), False)
    source = with_cache(replace(mlm_source(tmp_path, tiny_teacher), variants=1), teacher, tmp_path / "kept")
    with pytest.raises(ModelError, match="expected hidden states that fit fp16"):
        fill(source, teacher)
    assert not list(tmp_path.rglob("*.parquet"))


# ---- training


def run_of(folder: Path, teacher: str, corpus: Path, name: str, **targets: Any) -> Config:
    """One row at a time, so that fill and live teacher see batches of one shape and say the same to the last bit."""
    distill = {"micro_batch_size": 1, "lr": 1e-3, "augment": {}, "targets": {"mask_variants": 2, **targets}}
    return config_for(
        folder, teacher, corpus, name=name, finetune=None, evaluate=None, corpus={"labelled_share": 1.0},
        distill=distill,
    )  # fmt: skip


def weights(config: Config) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(config.run_dir / rundir.DISTILLED / "model.safetensors")


@pytest.fixture(scope="module")
def cached(
    ray_cluster: None, tiny_classifier: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, list[str]]:
    """A run that trained from a cache it filled, and what it said."""
    folder = tmp_path_factory.mktemp("cached")
    corpus = write_jsonl(folder / "few.jsonl", sentences(60))
    config = run_of(folder, tiny_classifier, corpus, "cached", cache=str(folder / "kept"))
    said: list[str] = []
    pipeline.run_all(config, said.append)
    return config, said


@pytest.mark.slow
def test_a_second_student_needs_no_teacher(cached: tuple[Config, list[str]]) -> None:
    config, said = cached
    assert (kept(config)["teacher_builds"], stage(config)["teacher_builds"]) == (1, 0)
    assert any("teacher built 0x" in line for line in said)
    assert config.distill is not None
    shallow = config.student.model_copy(update={"layers": (1,)})
    mild = config.distill.model_copy(update={"loss": LossConfig(kd=1, task=3, cosine=0.5), "epochs": 1})
    other = config.model_copy(update={"name": "other", "student": shallow, "distill": mild})
    pipeline.run_all(other, quiet)
    assert (kept(other)["shards_written"], kept(other)["teacher_builds"]) == (0, 0)
    assert stage(other)["teacher_builds"] == 0


@pytest.mark.slow
def test_a_cache_trains_as_a_live_teacher_does(cached: tuple[Config, list[str]]) -> None:
    """The same weights, bit for bit."""
    config, _ = cached
    assert config.distill is not None
    targets = config.distill.targets.model_copy(update={"cache": None})
    distill = config.distill.model_copy(update={"targets": targets})
    live = config.model_copy(update={"name": "live", "distill": distill})
    pipeline.run_all(live, quiet)
    assert stage(live)["teacher_builds"] == 1
    first, second = weights(live), weights(config)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(live.run_dir, "distill")[-1] == losses(config.run_dir, "distill")[-1]


def kept(config: Config) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((config.run_dir / "targets.json").read_text())
    return summary


def stage(config: Config) -> dict[str, Any]:
    summary = rundir.read_summary(config.run_dir, "distill")
    assert summary is not None
    return summary


@pytest.mark.slow
def test_masked_texts_train_from_their_variants(
    ray_cluster: None, tiny_teacher: str, corpus_file: Path, tmp_path: Path
) -> None:
    shape: dict[str, Any] = {**LANGUAGE_MODEL, "evaluate": None}
    turns = {"mask_variants": 2}
    live = config_for(
        tmp_path, tiny_teacher, corpus_file, name="live", **shape, distill={"epochs": 3, "targets": turns}
    )
    turns = {**turns, "cache": str(tmp_path / "kept")}
    cached = config_for(
        tmp_path, tiny_teacher, corpus_file, name="kept", **shape, distill={"epochs": 3, "targets": turns}
    )
    for config in (live, cached):
        pipeline.run_all(config, quiet)
    assert stage(cached)["teacher_builds"] == 0
    assert losses(live.run_dir, "distill")[-1][1] == pytest.approx(losses(cached.run_dir, "distill")[-1][1], rel=1e-3)
