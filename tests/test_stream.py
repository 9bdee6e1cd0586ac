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
