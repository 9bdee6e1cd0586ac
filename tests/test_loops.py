"""The loops that the stream is measured against do the same work as it does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipeline import LANGUAGE_MODEL, config_for, quiet

from raydistil.bench.loops import InProcess, Reference, published_loss, texts_of
from raydistil.chain import links
from raydistil.models import load_model, load_tokenizer, on_device
from raydistil.pipeline import lesson
from raydistil.prepare import prepare
from raydistil.probe import StudentOnly, taught
from raydistil.source import MicroBatches
from raydistil.specs import TrainRun
from raydistil.stages import train_run
from raydistil.types import IGNORE, TokenBatch

TRIPLE = {"kd": 5.0, "task": 2.0, "cosine": 1.0, "temperature": 2.0, "kd_positions": "all"}


@pytest.fixture
def planned(tiny_teacher: str, corpus_file: Path, tmp_path: Path) -> TrainRun:
    changes = {**LANGUAGE_MODEL, "evaluate": None, "distill": {"epochs": 1, "loss": TRIPLE, "dropout": 0.0}}
    run = prepare(config_for(tmp_path, tiny_teacher, corpus_file, **changes), quiet)
    (link,) = links(run.config, run.teacher_dirs, run.run_dir)
    return train_run(run, lesson(run, link))


def batches(planned: TrainRun, count: int) -> list[TokenBatch]:
    source = MicroBatches(planned.source)
    return [source.make(index) for index in range(count)]


def test_every_loop_has_the_losses_of_the_published_one(planned: TrainRun, one_thread: None) -> None:
    """But for what rounds the states on the wire."""
    (batch,) = made = batches(planned, 1)
    assert batch.labels_BL is not None
    student, teacher = (load_model(model, "mlm") for model in (planned.worker.init, planned.worker.teachers[0].model))
    ids_BL, mask_BL, *_ = on_device(batch, torch.device("cpu"))
    labels_BL = torch.from_numpy(batch.labels_BL.astype(np.int64))
    asked = {"input_ids": ids_BL, "attention_mask": mask_BL, "output_hidden_states": True}
    with torch.no_grad():
        expected = published_loss(student(**asked), teacher(**asked), mask_BL, labels_BL, planned.worker.loss)
    tight, tokens = InProcess(planned, made).losses()
    wired, _ = StudentOnly(planned, taught(planned, made)).losses()
    assert tokens == batch.num_tokens
    torch.testing.assert_close(tight.detach(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(wired.detach(), expected, rtol=1e-3, atol=1e-4)


def test_a_step_moves_the_weights_and_says_its_tokens(
    planned: TrainRun, tiny_teacher: str, one_thread: None
) -> None:  # fmt: skip
    made, last = batches(planned, 2), load_tokenizer(tiny_teacher).sep_token_id
    for loop in (InProcess(planned, made), StudentOnly(planned, taught(planned, made)), Reference(planned, made, last)):
        before = [parameter.detach().clone() for parameter in loop.model.parameters()]
        assert loop.step() > 0
        moved = [not torch.equal(old, new) for old, new in zip(before, loop.model.parameters(), strict=True)]
        assert all(moved)
        assert loop.rate(1) > 0


def test_the_texts_of_a_block_come_back_as_rows() -> None:
    ids_BL = np.array([[2, 7, 8, 3, 9, 3, 5, 3, 0, 0]], np.int32)  # 2 begins, 3 ends, 0 pads
    labels_BL = np.full_like(ids_BL, IGNORE)
    labels_BL[0, 4] = 6
    batch = TokenBatch(0, ids_BL, np.array([8], np.int32), None, labels_BL, 1, np.array([0]))
    texts = [(ids.tolist(), labels.tolist()) for ids, labels in texts_of(batch, 3)]
    assert [ids for ids, _ in texts] == [[2, 7, 8, 3], [2, 9, 3], [2, 5, 3]]
    assert [labels for _, labels in texts] == [[IGNORE] * 4, [IGNORE, 6, IGNORE], [IGNORE] * 3]
