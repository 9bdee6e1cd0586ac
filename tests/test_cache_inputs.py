"""What a cache depends on, and how large it is going to be."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kept import filled, teacher_of
from sources import class_source, mlm_source

from raydistil.cache.inputs import inputs_of, model_hash
from raydistil.cache.layout import place_of, shards
from raydistil.cache.sizes import sizes_of
from raydistil.check import check
from raydistil.config import MaskingConfig
from raydistil.config.loss import LossConfig
from raydistil.config.targets import AugmentConfig, TargetsConfig
from raydistil.errors import ModelError
from raydistil.places import compared_share
from raydistil.specs import CacheSpec, SourceSpec, TargetsSpec, TeacherSpec

Change = Callable[[TeacherSpec, SourceSpec], tuple[TeacherSpec, SourceSpec]]


@pytest.fixture(scope="module")
def texts(tiny_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> SourceSpec:
    return replace(mlm_source(tmp_path_factory.mktemp("texts"), tiny_teacher), variants=2)


@pytest.fixture(scope="module")
def teacher(tiny_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> TeacherSpec:
    """One whose targets hang on everything there is: drawn from sampled places, beside states."""
    folder = tmp_path_factory.mktemp("own") / "teacher"
    shutil.copytree(tiny_teacher, folder)
    return teacher_of(str(folder), "mlm", (4,), True, LossConfig(kd_positions="sample"), codec="sampled")


def targets(**changes: Any) -> Change:
    return lambda t, s: (replace(t, targets=replace(t.targets, **changes)), s)


def config(**changes: Any) -> Change:
    return lambda t, s: targets(config=t.targets.config.model_copy(update=changes))(t, s)


def loss(**changes: Any) -> Change:
    return lambda t, s: targets(loss=t.targets.loss.model_copy(update=changes))(t, s)


def reseeded(t: TeacherSpec, s: SourceSpec) -> tuple[TeacherSpec, SourceSpec]:
    return replace(t, targets=replace(t.targets, seed=4)), replace(s, manifest=replace(s.manifest, seed=4))


COUNTS: dict[str, Change] = {
    "precision": lambda t, s: (replace(t, precision="bfloat16"), s),
    "task": lambda t, s: (replace(t, task="classification"), s),
    "store": lambda t, s: (t, replace(s, store=s.store.parent / "others")),
    "masks": lambda t, s: (t, replace(s, masking=MaskingConfig(share=0.2))),
    "kind of masks": lambda t, s: (t, replace(s, masking=MaskingConfig(kind="frequency"))),
    "seed": reseeded,
    "states": targets(states=(2, 4)),
    "states' dtype": config(states="int8"),
    "soft labels": targets(soft_labels=False),
    "codec": config(codec="topk"),
    "draws": config(num_draws=51),
    "temperature": loss(temperature=3.0),
    "positions": loss(kd_positions="all"),
    "sample": loss(kd_sample=0.5),
    "no task": loss(task=0.0),
}
IDLE: dict[str, Change] = {
    "weights": loss(kd=1.0, task=0.1, cosine=0.0),
    "epochs": lambda t, s: (t, replace(s, manifest=replace(s.manifest, epochs=9))),
    "variants": lambda t, s: (t, replace(s, variants=5)),
    "micro-batches": lambda t, s: (t, replace(s, manifest=replace(s.manifest, micro_batch_size=3))),
    "threads": lambda t, s: (replace(t, threads=7), s),
    "another codec's": config(top_k=3),
}


@pytest.mark.parametrize("name", COUNTS)
def test_what_targets_depend_on_changes_the_fingerprint(teacher: TeacherSpec, texts: SourceSpec, name: str) -> None:
    assert inputs_of(*COUNTS[name](teacher, texts)) != inputs_of(teacher, texts)


@pytest.mark.parametrize("name", IDLE)
def test_what_they_do_not_depend_on_leaves_it(teacher: TeacherSpec, texts: SourceSpec, name: str) -> None:
    assert inputs_of(*IDLE[name](teacher, texts)) == inputs_of(teacher, texts)


def test_the_largest_few_depend_on_how_many(teacher: TeacherSpec, texts: SourceSpec) -> None:
    few, more = (config(codec="topk", top_k=k)(teacher, texts) for k in (3, 4))
    assert inputs_of(*few) != inputs_of(*more)


def test_logits_of_classes_depend_on_no_seed_and_no_temperature(tiny_classifier: str, tmp_path: Path) -> None:
    """Nothing is drawn, and logits are what they are."""
    source = class_source(tmp_path, tiny_classifier)
    plain = teacher_of(tiny_classifier, "classification", (4,), True)
    for change in (reseeded, loss(temperature=9.0), loss(kd_positions="all")):
        assert inputs_of(*change(plain, source)) == inputs_of(plain, source)


def test_augmented_texts_are_of_their_seed_and_shares(tiny_classifier: str, tmp_path: Path) -> None:
    source = replace(class_source(tmp_path, tiny_classifier), augment=AugmentConfig(), variants=2)
    plain = teacher_of(tiny_classifier, "classification", (4,), True)
    sources = source, replace(source, augment=None), replace(source, augment=AugmentConfig(cut=0.1))
    assert len({str(inputs_of(plain, made)) for made in sources} | {str(inputs_of(*reseeded(plain, source)))}) == 4


def test_a_causal_models_places_have_a_token_to_find() -> None:
    wanted = TargetsSpec(TargetsConfig(codec="topk", top_k=8), LossConfig(cosine=0), (), True, 0)
    assert sizes_of("clm", wanted, 0.15, width=32, classes=1000).per_token == 4 + 8 * 4 + 2 + 4


def test_vectors_depend_on_how_they_are_pooled(tiny_teacher: str, texts: SourceSpec, tmp_path: Path) -> None:
    found = []
    for name in ("mean_tokens", "cls_token"):
        folder = Path(shutil.copytree(tiny_teacher, tmp_path / name))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{name}": True}))
        found.append(
            inputs_of(replace(teacher_of(str(folder), "mlm", (4,), True, LossConfig()), task="embedding"), texts)
        )
    assert found[0]["teacher"] == found[1]["teacher"] and found[0] != found[1]


def test_a_model_is_known_by_its_bytes(tiny_teacher: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_teacher, tmp_path / "copy"))
    first = model_hash(tiny_teacher)
    assert model_hash(str(copy)) == first
    (copy / "README.md").write_text("not a weight")
    assert model_hash(str(copy)) == first
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    changed = model_hash(str(copy))
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace('"num_attention_heads": 4', '"num_attention_heads": 2'))
    assert len({first, changed, model_hash(str(copy))}) == 3
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"expected weights \(\.safetensors or \.bin\)"):
        model_hash(str(copy))


# ---- sizes


@pytest.mark.parametrize(
    ("states", "keys", "per_token"),
    [
        ((4,), {}, 4 + 64),
        ((0, 4), {"states": "int8"}, 4 + 2 * 36),
        ((), {"codec": "topk", "top_k": 8}, 4 + 0.15 * (8 * 4 + 2 + 4)),
        ((4,), {"codec": "logits"}, 4 + 64 + 0.15 * (2 * 1000 + 4)),
    ],
)
def test_bytes_of_a_token(states: tuple[int, ...], keys: dict[str, Any], per_token: float) -> None:
    wanted = TargetsSpec(TargetsConfig(**keys), LossConfig(), states, "codec" in keys, 0)
    assert sizes_of("mlm", wanted, 0.15, width=32, classes=1000).per_token == pytest.approx(per_token)


def test_a_rows_logits_count_once() -> None:
    wanted = TargetsSpec(TargetsConfig(), LossConfig(), (), True, 0)
    sizes = sizes_of("classification", wanted, 0.15, width=32, classes=6)
    assert (sizes.per_token, sizes.per_row) == (4, 40 + 12)
    assert sizes.of(1000, 10) == 4520


@pytest.mark.parametrize(
    ("loss", "share"),
    [
        (LossConfig(), 0.2),
        (LossConfig(kd=0), 0.2),
        (LossConfig(kd_positions="all"), 1.0),
        (LossConfig(kd_positions="sample", kd_sample=0.5), 1 - 0.8 * 0.5),
        (LossConfig(kd_positions="sample", kd_sample=0.5, task=0), 0.5),
    ],
)
def test_the_share_of_compared_places(loss: LossConfig, share: float) -> None:
    assert compared_share(loss, masked=0.2) == pytest.approx(share)


def test_what_is_written_is_at_most_what_was_reckoned(texts: SourceSpec, tiny_teacher: str, tmp_path: Path) -> None:
    from raydistil.tokens import TokenStore

    teacher = teacher_of(tiny_teacher, "mlm", (2, 4), False)
    source = filled(replace(texts, variants=1), teacher, tmp_path)
    assert source.caches
    sizes = sizes_of("mlm", teacher.targets, 0.15, 32, 30522)
    counts = TokenStore(source.store).meta.splits["train"]
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.parquet"))
    assert 0.5 < written / sizes.of(counts.tokens, counts.rows) < 1.2


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 7), st.integers(1, 4)), min_size=1, max_size=3),
    st.integers(1, 3),
)
def test_every_row_has_one_place(buckets: list[tuple[int, int, int]], variants: int) -> None:
    rows, groups_each, group = zip(*buckets, strict=True)
    steps = tuple(count * size for count, size in zip(groups_each, group, strict=True))
    spec = CacheSpec(Path(), "", None, rows, variants, steps, group)  # type: ignore[arg-type]
    found = set()
    whole = set(shards(spec))
    for bucket, count in enumerate(rows):
        for variant in range(variants):
            for row in range(count):
                shard, number, inside = place_of(spec, bucket, variant, row)
                assert shard in whole
                assert shard.first + number * group[bucket] + inside == row < shard.end
                found.add((shard, number, inside))
    assert len(found) == variants * sum(rows) == sum(shard.num_rows for shard in whole)


def test_check_says_what_a_cache_would_take(corpus_file: Path, tiny_teacher: str, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        f'task = "mlm"\ncorpus.source = "{corpus_file}"\ntokens.length = 32\nteacher.model = "{tiny_teacher}"\n'
        f"student.layers = [0, 2]\ndistill.epochs = 3\ndistill.targets.mask_variants = 2\n"
    )
    assert not any(line.startswith("targets:") for line in check(file, [], 0)["plan"])
    plan = check(file, [f"distill.targets.cache={tmp_path / 'kept'}"], 0)["plan"]
    assert [line.startswith("CPUs: 0 students x 1 + 1 teachers") for line in plan].count(True) == 1
    assert [line.startswith("CPUs: 1 students x 1 + 0 teachers") for line in plan].count(True) == 1
    (line,) = (line for line in plan if line.startswith("targets: about "))
    assert f"in {tmp_path / 'kept'} before compression (2 x (" in line
    assert "tokens x 68 bytes" in line
    assert not (tmp_path / "kept").exists()


def test_check_says_how_many_teachers_the_bound_in_flight_leaves_at_work(
    corpus_file: Path, tiny_teacher: str, tmp_path: Path
) -> None:
    """Of 1024 rows of 32 tokens, 68 bytes each (and 40 a row), four make a block."""
    file = tmp_path / "c.toml"
    file.write_text(
        f'task = "mlm"\ncorpus.source = "{corpus_file}"\ntokens.length = 32\nteacher.model = "{tiny_teacher}"\n'
        f"student.layers = [0, 2]\ndistill.micro_batch_size = 1024\ncluster.teachers = [1, 4]\n"
    )
    block = 4 * 1024 * (32 * 68 + 40)
    for bound, said in (
        (2 * block, [f"2 of 4 at work within cluster.max_bytes_in_flight {2 * block}"]),
        (4 * block, []),
    ):
        plan = check(file, [f"cluster.max_bytes_in_flight={bound}"], 0)["plan"]
        lines = [line for line in plan if line.startswith("in flight: ")]
        assert len(lines) == len(said)
        assert all(f"leave {text}: raise it to {4 * block}" in line for text, line in zip(said, lines, strict=True))


def test_check_counts_every_teacher_and_the_general_distillation(
    tiny_classifier: str, corpus_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        f'task = "classification"\ncorpus.source = "{corpus_file}"\ntokens.length = 32\n'
        f'teacher.model = "{tiny_classifier}"\nensemble = [{{ model = "{tiny_classifier}" }}]\n'
        f"student.layers = [0, 2]\ndistill.augment.keep = 1.0\ndistill.targets.cache = {str(tmp_path)!r}\n"
    )
    lines = [line for line in check(file, [], 0)["plan"] if line.startswith("targets: about ")]
    assert ["tokens x 196 bytes" in line for line in lines] == [True, True, False]
    assert "tokens x 4 bytes" in lines[2]
