"""The stream's invariants: parity with one process, order, one teacher, overlap bookkeeping, bounded memory."""

import time
from pathlib import Path

import pytest
import torch
from conftest import sentences, write_jsonl

from raydistil import wire
from raydistil.codecs import hidden
from raydistil.config import ClusterConfig, CorpusConfig, LossConfig, MaskingConfig, TokensConfig
from raydistil.corpus import open_corpus
from raydistil.losses import LossInputs, combined
from raydistil.manifest import Ledger, Manifest
from raydistil.models import HeadedEncoder, load_model, load_tokenizer, mlm_head, on_device
from raydistil.source import MicroBatches
from raydistil.specs import SourceSpec, TeacherSpec
from raydistil.stream import build_stream, execution_options
from raydistil.tokens import TokenStore, build_store
from raydistil.types import IGNORE, TeacherTargets, TokenBatch

CLUSTER = ClusterConfig()


def mlm_source(folder: Path, teacher: str, rows: int = 240, epochs: int = 2) -> SourceSpec:
    path = write_jsonl(folder / "corpus.jsonl", sentences(rows))
    corpus = open_corpus(CorpusConfig(source=str(path)), labelled=False)
    store = build_store(corpus, load_tokenizer(teacher), TokensConfig(length=32), labelled=False)
    manifest = Manifest(TokenStore(store).bucket_rows("train"), epochs, 8, seed=3)
    return SourceSpec(store, "train", manifest, MaskingConfig())


def class_source(folder: Path, teacher: str) -> SourceSpec:
    path = write_jsonl(folder / "labelled.jsonl", sentences(240))
    corpus = open_corpus(CorpusConfig(source=str(path)), labelled=True)
    tokens = TokensConfig(length=48, buckets=(16, 32))
    store = build_store(corpus, load_tokenizer(teacher), tokens, labelled=True)
    manifest = Manifest(TokenStore(store).bucket_rows("train"), 1, 8, seed=3)
    return SourceSpec(store, "train", manifest, None)


def streamed(source: SourceSpec, teacher: TeacherSpec | None, ledger: Ledger = Ledger()) -> list:  # noqa: B008
    total = source.manifest.num_micro_batches
    dataset = build_stream(source, total, ledger, teacher, CLUSTER)
    dataset.context.execution_options = execution_options(CLUSTER)
    return list(dataset.iter_batches(batch_size=1, batch_format="pyarrow"))


def gradients(student: HeadedEncoder, batch: TokenBatch, targets: TeacherTargets, head) -> dict[str, torch.Tensor]:
    student.zero_grad()
    ids_BL, mask_BL = on_device(batch, torch.device("cpu"))
    labels_T = torch.from_numpy(batch.labels_BL.astype("int64"))[mask_BL]
    at_T = labels_T != IGNORE
    hidden_TD, logits = student(ids_BL, mask_BL, at_T)
    with torch.no_grad():
        teacher_logits = head(targets.hidden_TD[at_T])
    inputs = LossInputs(logits, labels_T[at_T], hidden_TD, teacher_logits, targets.hidden_TD)
    combined(inputs, LossConfig()).loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def test_streamed_gradients_equal_in_process_ones(ray_cluster: None, tiny_teacher: str, tmp_path: Path) -> None:
    source = mlm_source(tmp_path, tiny_teacher)
    rows = streamed(source, TeacherSpec(tiny_teacher, "mlm", "float32", 1))
    teacher = HeadedEncoder(load_model(tiny_teacher, "mlm"), "mlm", "float32").eval()
    student = HeadedEncoder(load_model(tiny_teacher, "mlm"), "mlm", "float32").train()
    made = MicroBatches(source)
    for index in (0, 7, len(rows) - 1):
        streamed_batch = wire.batch_of(rows[index])
        device = torch.device("cpu")
        through = hidden.decode(wire.targets_of(rows[index]), streamed_batch.num_tokens, 8, device)
        batch = made.make(index)
        with torch.inference_mode():
            direct_wire = hidden.encode(*teacher(*on_device(batch, device), None))
        direct = hidden.decode(direct_wire, batch.num_tokens, 8, device)
        head = mlm_head(teacher.model)
        got, expected = gradients(student, streamed_batch, through, head), gradients(student, batch, direct, head)
        assert expected
        for name, gradient in expected.items():
            assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


def test_every_micro_batch_once_in_order_by_one_teacher(ray_cluster: None, tiny_teacher: str, tmp_path: Path) -> None:
    source = mlm_source(tmp_path, tiny_teacher, epochs=3)
    rows = streamed(source, TeacherSpec(tiny_teacher, "mlm", "float32", 1))
    assert [row["index"][0].as_py() for row in rows] == list(range(source.manifest.num_micro_batches))
    assert source.manifest.num_micro_batches > source.manifest.per_epoch
    assert len({row["teacher"][0].as_py() for row in rows}) == 1


def test_consumed_micro_batches_do_not_come_again(ray_cluster: None, tiny_teacher: str, tmp_path: Path) -> None:
    source = mlm_source(tmp_path, tiny_teacher)
    total = source.manifest.num_micro_batches
    ledger = Ledger().adding([0, 1, 2, 5, total - 1])
    rows = streamed(source, None, ledger)
    assert [row["index"][0].as_py() for row in rows] == [n for n in range(total) if n not in ledger]


def test_class_targets_are_the_teachers_own(ray_cluster: None, tiny_teacher: str, tmp_path: Path) -> None:
    source = class_source(tmp_path, tiny_teacher)
    torch.manual_seed(1)
    model = load_model(tiny_teacher, "classification", ("fruit", "metal", "river"))
    folder = tmp_path / "classifier"
    model.save_pretrained(folder)
    rows = streamed(source, TeacherSpec(str(folder), "classification", "float32", 1))
    widths = {row["width"][0].as_py() for row in rows}
    assert len(widths) > 1
    for row in rows[:5]:
        batch = wire.batch_of(row)
        targets = hidden.decode(wire.targets_of(row), batch.num_tokens, len(batch.lengths_B), torch.device("cpu"))
        ids_BL, mask_BL = on_device(batch, torch.device("cpu"))
        with torch.inference_mode():
            expected = model.eval()(input_ids=ids_BL, attention_mask=mask_BL).logits
        torch.testing.assert_close(targets.logits_BC, expected)


def test_a_slow_student_bounds_what_the_teacher_makes(ray_cluster: None, tiny_teacher: str, tmp_path: Path) -> None:
    source = mlm_source(tmp_path, tiny_teacher, rows=4000, epochs=8)
    bound = 1 << 20
    cluster = ClusterConfig(max_bytes_in_flight=bound)
    spec = TeacherSpec(tiny_teacher, "mlm", "float32", 1)
    total = source.manifest.num_micro_batches
    dataset = build_stream(source, total, Ledger(), spec, cluster)
    dataset.context.execution_options = execution_options(cluster)
    rows = iter(dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=1))
    first = next(rows)
    time.sleep(6)  # the student works on its first micro-batch
    resumed = time.time()
    ahead = [row for row in (next(rows) for _ in range(total - 1)) if row["ended_s"][0].as_py() < resumed]
    assert 0 < sum(row.nbytes for row in ahead) < 8 * bound < total * first.nbytes


@pytest.mark.parametrize("missing", [0, 1])
def test_past_the_end_micro_batches_hold_nothing(tiny_teacher: str, tmp_path: Path, missing: int) -> None:
    source = mlm_source(tmp_path, tiny_teacher)
    batch = MicroBatches(source).make(source.manifest.num_micro_batches + missing)
    assert batch.num_rows == 0
    assert (batch.labels_BL == IGNORE).all()
