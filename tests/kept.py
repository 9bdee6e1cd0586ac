"""Targets that are kept, made in this process: what a teacher's actor writes, without Ray."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from raydistil.cache.check import missing_shards, vouch
from raydistil.cache.inputs import inputs_of
from raydistil.cache.sizes import cache_spec, num_logits, sizes_of
from raydistil.config.loss import LossConfig
from raydistil.config.targets import TargetsConfig
from raydistil.fill import Filler, FillSpec
from raydistil.models import shape_of
from raydistil.specs import SourceSpec, TargetsSpec, TeacherSpec
from raydistil.tokens import TokenStore

SEED = 3  # of the sources in `sources`


def sized(codec: str, top_k: int, num_draws: int) -> dict[str, Any]:
    """The keys of a codec: of the two sizes its own, if it has one."""
    sizes = {"topk": {"top_k": top_k}, "sampled": {"num_draws": num_draws}}
    return {"codec": codec, **sizes.get(codec, {})}


def teacher_of(
    folder: str, task: str, numbers: tuple[int, ...], soft_labels: bool, loss: LossConfig | None = None, **config: Any
) -> TeacherSpec:
    targets = TargetsSpec(TargetsConfig(**config), loss or LossConfig(), numbers, soft_labels, SEED)
    return TeacherSpec(folder, task, "float32", 1, targets)


def with_cache(source: SourceSpec, teacher: TeacherSpec, root: Path) -> SourceSpec:
    """`source` with the place of its targets, which need not be there yet."""
    shape = shape_of(teacher.model, "teacher.model")
    classes = num_logits(teacher.task, shape.num_labels, shape, max(TokenStore(source.store).lengths(source.split)))
    masked = source.masking.share if source.masking else 0
    sizes = sizes_of(teacher.task, teacher.targets, masked, shape.hidden_size, classes)
    return replace(source, caches=(cache_spec(root, inputs_of(teacher, source), teacher.targets, source, sizes),))


def filled(source: SourceSpec, teacher: TeacherSpec, root: Path, shard_rows: int | None = None) -> SourceSpec:
    """`source` with its targets, complete; in files of so many rows."""
    kept = with_cache(source, teacher, root)
    if shard_rows is not None:
        assert kept.caches
        sizes = tuple(shard_rows for _ in kept.caches[0].shard_rows)
        groups = tuple(min(5, n) for n in sizes)
        kept = replace(kept, caches=(replace(kept.caches[0], shard_rows=sizes, group_rows=groups),))
    write_missing(kept, teacher)
    return kept


def write_missing(source: SourceSpec, teacher: TeacherSpec) -> list[str]:
    """Write what lacks; returns what was said."""
    assert source.caches
    said: list[str] = []
    missing = tuple(missing_shards(source.caches[0], said.append))
    filler = Filler(FillSpec(source.caches[0], replace(source, caches=()), teacher, missing))
    rows = pa.table({"shard": list(range(len(missing)))})
    assert sum(part.num_rows for part in filler(rows)) == len(missing)
    vouch(source.caches[0])
    return said
