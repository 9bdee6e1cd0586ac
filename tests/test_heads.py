"""Heads of every task: what they say, how it travels and is kept, and what is learned from it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import MINILM
from kept import filled, teacher_of
from made import HEADS, TAGS, source, write_teacher
from torch import Tensor
from transformers import AutoModel, DistilBertConfig, RobertaConfig

from raydistil import wire
from raydistil.config.loss import LossConfig
from raydistil.config.student import StudentConfig
from raydistil.distiller import Distiller
from raydistil.errors import ModelError
from raydistil.heads import NOWHERE, Inputs, has_types, pooling_of, span_logits, vectors
from raydistil.layers import plan_layers
from raydistil.losses import weights_at
from raydistil.models import HeadedEncoder, load_model, on_device, shape_of
from raydistil.size import num_parameters
from raydistil.source import MicroBatches
from raydistil.student import build_student, take_layers
from raydistil.targets import decode_targets
from raydistil.teacher import Teacher
from raydistil.types import IGNORE, Task, TeacherTargets, TokenBatch

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
LOSSES: dict[Task, dict[str, Any]] = {
    "token_classification": {"kd": 0.5, "temperature": 2.0, "task": 0.25, "cosine": 0},
    "question_answering": {"kd": 0.5, "temperature": 2.0, "task": 0.25, "cosine": 0},
    "embedding": {"kd": 3.0, "divergence": "mse", "task": 0, "cosine": 0},
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[Task, str]:
    folder = tmp_path_factory.mktemp("heads")
    return {task: write_teacher(folder / task, task) for task in HEADS}


def plainly(model: Any, batch: TokenBatch, task: Task) -> Tensor:
    """[N, C] of a model, row by row without padding, as transformers runs it."""
    said = []
    for row, length in enumerate(batch.lengths_B):
        ids = torch.from_numpy(batch.input_ids_BL[row : row + 1, :length].astype(np.int64))
        if task != "question_answering":
            out = model(input_ids=ids)
            state = out.logits[0] if task == "token_classification" else F.normalize(out.last_hidden_state.mean(1))
            said.append(state)
            continue
        assert batch.contexts_B is not None
        types = (torch.arange(length) >= int(batch.contexts_B[row])).long()[None]
        out = model(input_ids=ids, token_type_ids=types)
        for logits in (out.start_logits, out.end_logits):
            line = torch.full((1, batch.input_ids_BL.shape[1]), NOWHERE)
            line[0, 0] = logits[0, 0]
            line[0, :length][types[0] == 1] = logits[types == 1]
            said.append(line)
    return torch.cat(said)


@pytest.mark.parametrize("task", HEADS)
def test_a_head_says_what_transformers_says_of_each_row_alone(
    tmp_path: Path, teachers: dict[Task, str], task: Task
) -> None:
    batch = MicroBatches(source(tmp_path, task)).make(1)
    model = load_model(teachers[task], task).eval()
    encoder = HeadedEncoder(model, task, "float32")
    with torch.no_grad():
        states, said = encoder(on_device(batch, CPU), (0, 4))
        torch.testing.assert_close(said, plainly(model, batch, task), atol=2e-5, rtol=1e-4)
        last = model.base_model(input_ids=on_device(batch, CPU).ids_BL[:1, : batch.lengths_B[0]])
    if task != "question_answering":
        torch.testing.assert_close(states[4][: batch.lengths_B[0]], last.last_hidden_state[0], atol=2e-5, rtol=1e-4)


def expected_loss(task: Task, batch: TokenBatch, student: Tensor, taught: Tensor, config: LossConfig) -> Tensor:
    """The sum of its terms as their definitions have it."""
    if task == "embedding":
        return config.kd * (student - taught).square().mean()
    if task == "question_answering":
        assert batch.spans_B2 is not None
        labels, compared = torch.from_numpy(batch.spans_B2.ravel().astype(np.int64)), torch.ones(len(student)).bool()
    else:
        assert batch.tags_BL is not None
        real = np.arange(batch.tags_BL.shape[1]) < batch.lengths_B[:, None]
        tags = torch.from_numpy(batch.tags_BL[real].astype(np.int64))
        labels, compared = tags.where(tags >= 0, IGNORE), tags != IGNORE
    p, log_q = (taught / 2).softmax(-1)[compared], (student / 2).log_softmax(-1)[compared]
    kd = 4 * F.kl_div(log_q, p, reduction="batchmean")
    return config.kd * kd + config.task * F.cross_entropy(student, labels, ignore_index=IGNORE)


@pytest.mark.parametrize("task", HEADS)
def test_what_travels_and_what_is_kept_teach_the_same(tmp_path: Path, teachers: dict[Task, str], task: Task) -> None:
    """The loss and its gradients are those of their definitions on what the wire rounded to fp16; a cache holds it."""
    config = LossConfig(**LOSSES[task])
    spec, teacher = source(tmp_path, task), teacher_of(teachers[task], task, (4,), True, config)
    plain = MicroBatches(spec)
    (row,) = Teacher(teacher)(wire.table_of([plain.make(1)]))
    batch = wire.batch_of(row)
    columns = wire.targets_of(row)[0]
    kept = wire.targets_of(MicroBatches(filled(spec, teacher, tmp_path / "kept")).taught(1))[0]
    assert {name: bytes(part) for name, part in kept.items()} == {name: bytes(part) for name, part in columns.items()}
    given = decode_targets(teacher.targets, columns, batch.num_tokens, CPU)
    with torch.no_grad():
        exact = plainly(load_model(teachers[task], task).eval(), batch, task)
    assert isinstance(given.soft_labels, Tensor)
    torch.testing.assert_close(given.soft_labels.float(), exact, atol=2e-3, rtol=2e-3)
    _same_gradients(task, teachers[task], config, batch, given)


def _same_gradients(task: Task, folder: str, config: LossConfig, batch: TokenBatch, given: TeacherTargets) -> None:
    student = build_student(load_model(folder, task), StudentConfig(layers=(0, 2)), task)
    layers = plan_layers(config, task, False, 4, 2)
    distiller = Distiller(HeadedEncoder(student, task, "float32"), config, layers, 0, None).train()
    loss = distiller(batch, given, weights_at(config, 0.0)).loss
    assert isinstance(given.soft_labels, Tensor)
    expected = expected_loss(task, batch, plainly(student, batch, task), given.soft_labels.float(), config)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-4)
    found, wanted = (
        torch.autograd.grad(each, [p for p in student.parameters() if p.requires_grad], allow_unused=True)
        for each in (loss, expected)
    )
    for own, other in zip(found, wanted, strict=True):
        assert (own is None) == (other is None)
        if own is not None:
            torch.testing.assert_close(own, other, atol=1e-6, rtol=2e-3)


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("config", [{"num_layers": 2}, {"layers": (1, 3), "family": "distilbert"}])
def test_students_have_their_teachers_heads(teachers: dict[Task, str], task: Task, config: dict[str, Any]) -> None:
    """And with all layers say the same (but for token types, which a DistilBERT has not)."""
    teacher = load_model(teachers[task], task).eval()
    student = build_student(teacher, StudentConfig(**config), task)
    assert student.config.num_hidden_layers == 2 and num_parameters(student) < num_parameters(teacher)
    with torch.no_grad():
        teacher.base_model.embeddings.token_type_embeddings.weight.zero_()
        whole = build_student(teacher, StudentConfig(**{**config, "num_layers": None, "layers": (0, 1, 2, 3)}), task)
        inputs = Inputs(*tiny.ids(), contexts_B=torch.tensor([4, 3]))
        same = [HeadedEncoder(model.eval(), task, "float32")(inputs)[1] for model in (teacher, whole)]
    torch.testing.assert_close(*same, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("task", HEADS)
def test_layers_of_another_model_leave_the_head(teachers: dict[Task, str], tmp_path: Path, task: Task) -> None:
    first, second = load_model(teachers[task], task), load_model(write_teacher(tmp_path / "other", task, 5), task)
    take_layers(first, second)
    assert torch.equal(first.get_input_embeddings().weight, second.get_input_embeddings().weight)
    heads = ("classifier.weight", "qa_outputs.weight")
    for name, parameter in first.named_parameters():
        if name in heads:
            assert not torch.equal(parameter, dict(second.named_parameters())[name])


# ---- spans, types, pooling


def test_spans_are_of_the_context_or_of_nothing() -> None:
    inputs = Inputs(torch.zeros(2, 6).long(), torch.arange(6) < torch.tensor([[6], [5]]), None, torch.tensor([3, 4]))
    logits = span_logits(torch.ones(2, 6), 2 * torch.ones(2, 6), inputs)
    allowed = torch.tensor([[1, 0, 0, 1, 1, 1], [1, 0, 0, 0, 1, 0]]).bool().repeat_interleave(2, 0)
    assert torch.equal(logits != NOWHERE, allowed)
    assert logits[:, 0].tolist() == [1, 2, 1, 2]
    assert logits.softmax(-1)[~allowed].max() == 0


def test_who_tells_a_question_from_its_context() -> None:
    kinds = {name: has_types(tiny.model(shape, "question_answering")) for name, shape in tiny.FAMILIES.items()}
    assert kinds == {"bert": True, "roberta": True, "mpnet": False, "electra": True}
    published = RobertaConfig(**tiny.SHAPE, type_vocab_size=1)
    assert not has_types(tiny.model(published, "question_answering"))
    distil = DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    assert not has_types(tiny.model(distil, "question_answering"))


def test_vectors_are_means_of_real_tokens_or_the_first() -> None:
    states = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    mean = torch.stack([states[0].mean(0), states[1, :2].mean(0)])
    torch.testing.assert_close(vectors(states, mask, "mean"), mean / mean.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(vectors(states, mask, "cls"), F.normalize(states[:, 0], dim=-1))


def test_pooling_is_found_where_sentence_transformers_keeps_it(tmp_path: Path) -> None:
    path = write_teacher(tmp_path / "plain", "embedding")
    assert load_model(path, "embedding").config.pooling == "mean"
    assert load_model(MINILM, "embedding").config.pooling == "mean"
    (tmp_path / "plain" / "1_Pooling").mkdir()
    layout = tmp_path / "plain" / "1_Pooling" / "config.json"
    layout.write_text(json.dumps({"word_embedding_dimension": 16, "pooling_mode_cls_token": True}))
    model = load_model(path, "embedding")
    assert model.config.pooling == "cls"
    build_student(model, StudentConfig(layers=(0,)), "embedding").save_pretrained(tmp_path / "student")
    assert pooling_of(str(tmp_path / "student"), shape_of(str(tmp_path / "student"), "x")) == "cls"
    layout.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ModelError, match="expected vectors that are the mean or the first token's, got max_tokens"):
        load_model(path, "embedding")


def test_a_student_of_vectors_loads_with_transformers_alone(tmp_path: Path, teachers: dict[Task, str]) -> None:
    load_model(teachers["embedding"], "embedding").save_pretrained(tmp_path / "own")
    _, found = AutoModel.from_pretrained(tmp_path / "own", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]


def test_classes_of_words_are_the_heads(teachers: dict[Task, str]) -> None:
    names = ("O", "B-x", "I-x")
    model = load_model(teachers["token_classification"], "token_classification", names)
    assert tuple(model.config.id2label.values()) == names and model.classifier.out_features == 3
    assert load_model(teachers["token_classification"], "token_classification").config.num_labels == len(TAGS)


def test_rows_without_weight_are_as_wide_as_others(tmp_path: Path) -> None:
    """What makes up a whole step beyond the manifest."""
    for task in HEADS:
        made = MicroBatches(source(tmp_path, task))
        empty = made.make(10_000)
        assert empty.num_rows == 0 and len(empty.input_ids_BL) == 1
        back = wire.batch_of(wire.table_of([empty]))
        for name in ("tags_BL", "spans_B2", "contexts_B"):
            assert (getattr(back, name) is None) == (getattr(made.make(0), name) is None)
        assert replace(back, index=0).num_tokens == empty.num_tokens
