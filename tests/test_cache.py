"""Kept targets: what is read is what was sent, whatever reads it; what is broken or missing is written anew."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import decoders
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from kept import SEED, filled, sized, teacher_of, with_cache, write_missing
from sources import class_source, mlm_source

from raydistil import wire
from raydistil.cache.check import describe_inputs, missing_shards, vouch
from raydistil.cache.files import fault_of
from raydistil.cache.layout import path_of, shards
from raydistil.cache.read import CachedTargets
from raydistil.config.loss import LossConfig
from raydistil.config.targets import AugmentConfig
from raydistil.errors import StorageError
from raydistil.places import compared_places
from raydistil.source import MicroBatches
from raydistil.specs import SourceSpec, TeacherSpec
from raydistil.storage import ABANDONED_S
from raydistil.targets import PLACES_AT_ONCE, decode_targets
from raydistil.teacher import Teacher
from raydistil.types import Sparse, TokenBatch

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ROWS = np.array([5, 0, 11, 6, 2])


@pytest.fixture(scope="module")
def texts(tiny_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> SourceSpec:
    made = mlm_source(tmp_path_factory.mktemp("texts"), tiny_teacher, rows=120, epochs=3)
    return replace(made, variants=2)


@pytest.fixture(scope="module")
def classes(tiny_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> SourceSpec:
    return class_source(tmp_path_factory.mktemp("classes"), tiny_teacher)


def read(source: SourceSpec, batch: TokenBatch, bucket: int, variant: int, rows: Any = ROWS) -> dict[str, bytes]:
    assert source.caches
    return CachedTargets(source.caches[0]).columns(batch, bucket, variant, rows)


def paths(source: SourceSpec) -> list[Path]:
    assert source.caches
    return [path_of(source.caches[0], shard) for shard in shards(source.caches[0])]


# ---- what is read is what was sent

SAMPLE = LossConfig(kd_positions="sample", kd_sample=0.4)


@pytest.mark.parametrize("states", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("numbers", [(4,), (0, 2, 4)])
def test_states_come_back_bit_for_bit(
    texts: SourceSpec, tiny_teacher: str, tmp_path: Path, states: str, numbers: tuple[int, ...]
) -> None:
    teacher = teacher_of(tiny_teacher, "mlm", numbers, False, states=states)
    source = filled(texts, teacher, tmp_path, shard_rows=7)
    for variant in (0, 1):
        batch = MicroBatches(texts).visit(0, ROWS, variant)
        assert read(source, batch, 0, variant) == Teacher(teacher).targets(batch)


@pytest.mark.parametrize("loss", [LossConfig(), SAMPLE, LossConfig(kd_positions="all")], ids=["masked", "some", "all"])
@pytest.mark.parametrize("codec", ["logits", "topk", "sampled"])
def test_soft_labels_come_back_bit_for_bit(
    texts: SourceSpec, tiny_teacher: str, tmp_path: Path, codec: str, loss: LossConfig
) -> None:
    teacher = teacher_of(tiny_teacher, "mlm", (4,), True, loss, **sized(codec, 5, 20))
    source = filled(texts, teacher, tmp_path, shard_rows=10)
    batch = MicroBatches(texts).visit(0, ROWS, 1)
    assert read(source, batch, 0, 1) == Teacher(teacher).targets(batch)


def test_many_draws_and_their_wide_counts(texts: SourceSpec, tiny_teacher: str, tmp_path: Path) -> None:
    teacher = teacher_of(tiny_teacher, "mlm", (), True, codec="sampled", num_draws=300)
    source = filled(texts, teacher, tmp_path)
    batch = MicroBatches(texts).visit(0, ROWS, 0)
    assert read(source, batch, 0, 0) == Teacher(teacher).targets(batch)


@pytest.mark.parametrize("codec", ["hidden", "topk"])
def test_classes_come_back_as_they_were_written(
    classes: SourceSpec, tiny_classifier: str, tmp_path: Path, codec: str
) -> None:
    """A fill and a live teacher may go by other groups of rows, whose logits differ in the last bits."""
    teacher = teacher_of(tiny_classifier, "classification", (4,), True, **sized(codec, 2, 50))
    source = filled(classes, teacher, tmp_path)
    for bucket in range(len(classes.manifest.bucket_rows)):
        batch = MicroBatches(classes).visit(bucket, ROWS, 0)
        given, live = read(source, batch, bucket, 0), Teacher(teacher).targets(batch)
        kept, sent = (decode_targets(teacher.targets, part, batch.num_tokens, CPU) for part in (given, live))
        torch.testing.assert_close(kept.states[4], sent.states[4], rtol=1e-3, atol=1e-4)
        first, second = kept.soft_labels, sent.soft_labels
        if codec == "hidden":
            torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(first.ids_NK, second.ids_NK)
            torch.testing.assert_close(first.probs_NK, second.probs_NK, rtol=1e-3, atol=1e-4)
    same = np.arange(classes.manifest.micro_batch_size)  # as the fill had them
    batch = MicroBatches(classes).visit(0, same, 0)
    assert read(source, batch, 0, 0, same) == Teacher(teacher).targets(batch)


def test_augmented_texts_come_back_with_what_is_said_of_them(
    tiny_teacher: str, tiny_classifier: str, tmp_path: Path
) -> None:
    """Row by row, since a fill and a live teacher may go by other groups of rows."""
    plain = class_source(tmp_path, tiny_teacher)
    manifest = replace(plain.manifest, epochs=2, micro_batch_size=1)
    source = replace(plain, manifest=manifest, augment=AugmentConfig(keep=0.1), variants=2)
    teacher = teacher_of(tiny_classifier, "classification", (4,), True)
    kept, live = MicroBatches(filled(source, teacher, tmp_path)), Teacher(teacher)
    for index in range(0, manifest.num_micro_batches, 29):
        row, batch = kept.taught(index), MicroBatches(source).make(index)
        assert np.array_equal(wire.batch_of(row).labels_B, batch.labels_B)
        (columns,) = wire.targets_of(row)
        assert {name: bytes(part) for name, part in columns.items()} == live.targets(batch)


@pytest.mark.parametrize("codec", ["logits", "topk", "sampled"])
def test_documents_come_back_with_their_soft_labels(tmp_path: Path, codec: str) -> None:
    """More places than the teacher says at once: kept in one part, sent in several."""
    folder = decoders.write_model(tmp_path / "model", "gpt2")
    texts = replace(decoders.source(tmp_path, folder, size=24, length=64), variants=1)
    teacher = teacher_of(folder, "clm", (4,), True, LossConfig(cosine=0), **sized(codec, 5, 20))
    row, batch = MicroBatches(filled(texts, teacher, tmp_path)).taught(0), MicroBatches(texts).make(0)
    kept = decode_targets(teacher.targets, wire.targets_of(row)[0], batch.num_tokens, CPU)
    live = decode_targets(teacher.targets, Teacher(teacher).targets(batch), batch.num_tokens, CPU)
    places = compared_places(batch, teacher.targets.loss, SEED).at_T.sum()
    assert len(live.states[4]) > places > PLACES_AT_ONCE
    torch.testing.assert_close(kept.states[4], live.states[4], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dense(kept.soft_labels, places), dense(live.soft_labels, places), rtol=1e-3, atol=2e-3)


def dense(soft_labels: Any, places: int) -> torch.Tensor:
    """Logits as they are; of few classes, the probabilities of all."""
    if not isinstance(soft_labels, Sparse):
        return soft_labels.float()
    zeros = torch.zeros(places, len(decoders.tokenizer()))
    return zeros.scatter_add_(-1, soft_labels.ids_NK, soft_labels.probs_NK)


def test_the_source_hands_out_what_the_teacher_would(texts: SourceSpec, tiny_teacher: str, tmp_path: Path) -> None:
    teacher = teacher_of(tiny_teacher, "mlm", (4,), True, SAMPLE, codec="topk", top_k=3)
    kept, live = MicroBatches(filled(texts, teacher, tmp_path)), Teacher(teacher)
    for index in range(0, texts.manifest.num_micro_batches, 3):
        row, batch = kept.taught(index), MicroBatches(texts).make(index)
        assert row.schema == wire.schema_of(1)
        assert wire.timings_of(row, batch.num_tokens) == []
        assert np.array_equal(wire.batch_of(row).input_ids_BL, batch.input_ids_BL)
        (columns,) = wire.targets_of(row)
        assert {name: bytes(part) for name, part in columns.items()} == live.targets(batch)


def test_past_the_end_there_are_targets_of_no_weight(texts: SourceSpec, tiny_teacher: str, tmp_path: Path) -> None:
    teacher = teacher_of(tiny_teacher, "mlm", (4,), True, codec="logits")
    row = MicroBatches(filled(texts, teacher, tmp_path)).taught(texts.manifest.num_micro_batches + 1)
    batch = wire.batch_of(row)
    assert batch.num_rows == 0
    given = decode_targets(teacher.targets, wire.targets_of(row)[0], batch.num_tokens, CPU)
    assert len(given.soft_labels) == compared_places(batch, teacher.targets.loss, SEED).at_T.sum()


# ---- any tool reads it


def test_states_are_numbers_to_plain_parquet(texts: SourceSpec, tiny_teacher: str, tmp_path: Path) -> None:
    for states in ("fp16", "bf16", "int8"):
        teacher = teacher_of(tiny_teacher, "mlm", (2, 4), False, states=states)
        table = pq.read_table(paths(filled(texts, teacher, tmp_path))[0])
        batch = MicroBatches(texts).visit(0, np.arange(3), 0)
        sent = decode_targets(teacher.targets, Teacher(teacher).targets(batch), batch.num_tokens, CPU)
        end = 0
        for place, row in enumerate(table.slice(0, 3).to_pylist()):
            length = int(batch.lengths_B[place])
            assert row["row"] == place
            assert row["input_ids"] == batch.input_ids_BL[place, :length].tolist()
            state_TD = torch.tensor(row["state_2"], dtype=torch.float32)
            assert state_TD.shape == (length, 32)
            if states == "int8":
                state_TD = (state_TD - 128) * torch.tensor(row["state_2_scale"])[:, None]
            assert torch.equal(state_TD, sent.states[2][end : end + length])
            end += length


def test_soft_labels_are_numbers_to_plain_parquet(texts: SourceSpec, tiny_teacher: str, tmp_path: Path) -> None:
    batch = MicroBatches(texts).visit(0, np.arange(1), 0)
    places = np.flatnonzero(batch.labels_BL[0] != -100).tolist()
    assert places
    for codec in ("topk", "sampled"):
        teacher = teacher_of(tiny_teacher, "mlm", (), True, **sized(codec, 4, 9))
        row = pq.read_table(paths(filled(texts, teacher, tmp_path))[0]).slice(0, 1).to_pylist()[0]
        sent = decode_targets(teacher.targets, Teacher(teacher).targets(batch), 1, CPU).soft_labels
        assert row["places"] == places
        if codec == "topk":
            assert row["top_ids"] == sent.ids_NK.tolist()
            probs = torch.tensor(row["top_log_probs"]).exp()
            torch.testing.assert_close(probs[:, :-1], sent.probs_NK, rtol=2e-3, atol=0)
            torch.testing.assert_close(probs.sum(-1), torch.ones(len(places)), rtol=2e-3, atol=0)
        else:
            assert [sum(counts) for counts in row["drawn_counts"]] == [9] * len(places)
            assert row["drawn_ids"][0] == sent.ids_NK[0, : len(row["drawn_ids"][0])].tolist()


def test_class_logits_are_numbers_to_plain_parquet(classes: SourceSpec, tiny_classifier: str, tmp_path: Path) -> None:
    teacher = teacher_of(tiny_classifier, "classification", (), True)
    table = pq.read_table(paths(filled(classes, teacher, tmp_path))[0])
    assert table.column_names == ["row", "input_ids", "logits"]
    rows = np.arange(8)
    batch = MicroBatches(classes).visit(0, rows, 0)
    sent = decode_targets(teacher.targets, Teacher(teacher).targets(batch), batch.num_tokens, CPU)
    assert table["logits"].slice(0, 8).to_pylist() == [[logits] for logits in sent.soft_labels.tolist()]


# ---- whole or not there


@pytest.fixture
def kept(texts: SourceSpec, tiny_teacher: str, tmp_path: Path) -> tuple[SourceSpec, TeacherSpec]:
    teacher = teacher_of(tiny_teacher, "mlm", (4,), False)
    return filled(texts, teacher, tmp_path / "kept", shard_rows=7), teacher


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_only_what_is_missing_or_broken_is_written_again(kept: tuple[SourceSpec, TeacherSpec]) -> None:
    source, teacher = kept
    files = paths(source)
    before = {path: path.read_bytes() for path in files}
    assert len(files) > 6
    files[0].unlink()
    files[1].write_bytes(before[files[1]][: len(before[files[1]]) // 2])
    flip(files[2])
    files[3].write_bytes(b"")
    files[4].write_bytes(before[files[5]])
    times = {path: path.stat().st_mtime_ns for path in files if path.exists()}
    said = write_missing(source, teacher)
    assert [line.split(" is broken")[0] for line in said] == [f"targets: {path}" for path in files[1:5]]
    assert {path: path.read_bytes() for path in files} == before
    assert all(path.stat().st_mtime_ns == times[path] for path in files[5:])
    assert write_missing(source, teacher) == []


def test_rows_in_the_place_of_others_are_refused(kept: tuple[SourceSpec, TeacherSpec]) -> None:
    """Same number of rows, same fingerprint, whole, and put there while the run goes on: only the tokens tell."""
    source, _ = kept
    files = paths(source)
    files[0].write_bytes(files[1].read_bytes())
    with pytest.raises(StorageError, match="it is about other tokens"):
        read(source, MicroBatches(source).visit(0, np.arange(3), 0), 0, 0, np.arange(3))


@pytest.mark.parametrize("harm", [flip, lambda path: path.write_bytes(path.read_bytes()[:100])], ids=["bit", "cut"])
def test_a_file_that_breaks_during_the_training_is_named(kept: tuple[SourceSpec, TeacherSpec], harm: Any) -> None:
    source, _ = kept
    batch = MicroBatches(source).visit(0, np.arange(7), 0)
    harm(paths(source)[0])
    with pytest.raises(StorageError, match=r"rows-000000000\.parquet, cannot read them \(.+\): remove the file"):
        read(source, batch, 0, 0, np.arange(7))


def test_a_file_that_was_vouched_for_is_not_read_again(kept: tuple[SourceSpec, TeacherSpec]) -> None:
    source, _ = kept
    assert source.caches
    path, size = paths(source)[0], paths(source)[0].stat()
    assert vouch(source.caches[0]) == sum(p.stat().st_size for p in paths(source))
    flip(path)
    os.utime(path, ns=(size.st_atime_ns, size.st_mtime_ns))  # as rot on a disk would leave it
    said: list[str] = []
    assert missing_shards(source.caches[0], said.append) == said == []
    assert fault_of(path, 7, {"fingerprint": source.caches[0].fingerprint}) is not None


def test_what_a_killed_writer_left_goes_after_a_while(kept: tuple[SourceSpec, TeacherSpec]) -> None:
    source, _ = kept
    assert source.caches
    fresh, stale = (paths(source)[0].with_name(f".x{n}.new.elsewhere-1-0123abcd") for n in (1, 2))
    for path in (fresh, stale):
        path.write_bytes(b"half")
    os.utime(stale, (time.time() - 2 * ABANDONED_S,) * 2)
    assert missing_shards(source.caches[0], print) == []
    assert fresh.exists()
    assert not stale.exists()


def test_more_variants_keep_the_ones_there_are(kept: tuple[SourceSpec, TeacherSpec]) -> None:
    source, teacher = kept
    assert source.caches
    more = with_cache(replace(source, variants=3, caches=()), teacher, source.caches[0].path.parent).caches[0]
    assert more is not None
    assert (more.variants, more.fingerprint) == (3, source.caches[0].fingerprint)
    more = replace(more, shard_rows=source.caches[0].shard_rows, group_rows=source.caches[0].group_rows)
    assert {shard.variant for shard in missing_shards(more, print)} == {2}


def test_variants_the_epochs_do_not_get_to_are_not_kept(texts: SourceSpec, tiny_teacher: str, tmp_path: Path) -> None:
    teacher = teacher_of(tiny_teacher, "mlm", (4,), False)
    kept = with_cache(replace(texts, variants=8), teacher, tmp_path).caches[0]
    assert kept is not None and kept.variants == texts.manifest.epochs


def test_other_inputs_have_a_place_of_their_own(texts: SourceSpec, tiny_teacher: str, tmp_path: Path) -> None:
    from raydistil.cache.inputs import inputs_of

    teacher = teacher_of(tiny_teacher, "mlm", (4,), False)
    other = replace(teacher, precision="bfloat16")
    first, second = (with_cache(texts, spec, tmp_path).caches[0] for spec in (teacher, other))
    assert first is not None and second is not None
    assert describe_inputs(first, inputs_of(teacher, texts)) is None
    assert describe_inputs(second, inputs_of(other, texts)) == (
        f"targets: {tmp_path} has those of other inputs (precision), which are left alone; these go to {second.path}"
    )
    assert describe_inputs(second, inputs_of(other, texts)) is None
