"""Backends of a replica: all say what transformers says of each row, and the fastest that does is taken."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DistilBertConfig, PreTrainedModel

from raydistil.errors import ModelError
from raydistil.export.onnx import OnnxModel, to_onnx
from raydistil.export.smaller import to_bf16, to_int8
from raydistil.heads import NOWHERE, has_types
from raydistil.models import HeadedEncoder, load_model, transformer_layers
from raydistil.serve import choice
from raydistil.serve.backends import FILES, Grouped, Row, encoder, groups
from raydistil.serve.choice import ROUGH, choose
from raydistil.serve.served import ONE, Hardware
from raydistil.serve.unpadded import STEP, Laid, unpadded
from raydistil.types import Task

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS: tuple[Task, ...] = (
    "classification", "regression", "token_classification", "question_answering", "embedding", "mlm",
)  # fmt: skip
NAMES = ("torch", "packed")
MOST = tiny.SHAPE["max_position_embeddings"] - 2  # that RoBERTa takes


def rows_for(task: Task, lengths: tuple[int, ...]) -> list[Row]:
    draws = np.random.default_rng(1)
    made = []
    for length in lengths:
        ids = draws.integers(len(tiny.SPECIAL), tiny.SHAPE["vocab_size"], length).astype(np.int32)
        places = np.flatnonzero(draws.random(length) < 0.3) if task == "mlm" else None
        both = task == "question_answering" or (task == "classification" and length % 3 == 1)  # of these some are pairs
        made.append(Row(ids, 1 + length // 3 if both else None, places))
    return made


# Several groups of each backend but `packed`, out of order; equal ones and such of one token among them.
LENGTHS = (7, 1, MOST, 2, 19, 19, 3, 25, 1, 12, MOST, MOST, 28, 24, 5, 18, 30, 29, 27)


def small(task: Task, family: str = "bert", layers: int = 3, seed: int = 0) -> PreTrainedModel:
    if family == "distilbert":
        shape: Any = DistilBertConfig(
            vocab_size=tiny.SHAPE["vocab_size"], dim=16, n_layers=layers, n_heads=2, hidden_dim=24,
            max_position_embeddings=32,
        )  # fmt: skip
    else:
        shape = tiny.FAMILIES[family].from_dict(tiny.FAMILIES[family].to_dict() | {"num_hidden_layers": layers})
    if task == "regression":
        shape.update({"num_labels": 1, "problem_type": "regression"})
    made = tiny.model(shape, task, seed)
    made.config.pooling = "mean"
    return made


def backend(name: str, model: PreTrainedModel, task: Task) -> Grouped:
    return Grouped(name, encoder(name, model, task), task)


@torch.no_grad()
def plainly(model: Any, row: Row, task: Task) -> Tensor:
    """What transformers says of a text alone."""
    ids = torch.from_numpy(row.ids.astype(np.int64))[None]
    inside = torch.arange(len(row.ids)) >= (len(row.ids) if row.context is None else row.context)
    if task == "question_answering":
        out = model(input_ids=ids, **({"token_type_ids": inside.long()[None]} if has_types(model) else {}))
        inside[0] = True
        return torch.cat([out.start_logits, out.end_logits]).where(inside[None], NOWHERE)
    typed = row.context is not None and has_types(model)
    out = model(input_ids=ids, **({"token_type_ids": inside.long()[None]} if typed else {}))
    if task == "embedding":
        return F.normalize(out.last_hidden_state[0].mean(0), dim=-1)
    return out.logits[0, row.places] if task == "mlm" else out.logits[0]


def check(found: list[Any], model: PreTrainedModel, rows: list[Row], task: Task, off: float = 1e-5) -> None:
    """Of every row, in their order; and each result is an array of its own."""
    assert len(found) == len(rows)
    for said, row in zip(found, rows, strict=True):
        expected = plainly(model, row, task).numpy()
        assert said.dtype == np.float32 and said.base is None
        np.testing.assert_allclose(said, expected, atol=off, rtol=1e-4, strict=True)


# ---- PyTorch


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", TASKS)
def test_a_backend_says_what_transformers_says_of_each_row_alone(task: Task, name: str) -> None:
    model, rows = small(task), rows_for(task, LENGTHS)
    own = backend(name, model, task)
    assert own.name == name
    check(own.run(rows), model, rows, task)
    check(own.run(rows[1:2]), model, rows[1:2], task)
    assert own.run([]) == []


@pytest.mark.parametrize("task", ["classification", "question_answering", "mlm"])
@pytest.mark.parametrize("family", ["roberta", "electra", "distilbert"])
def test_families_without_padding_say_what_they_said_with_it(family: str, task: Task) -> None:
    model, rows = small(task, family), rows_for(task, LENGTHS)
    check(backend("packed", model, task).run(rows), model, rows, task)


def test_layers_see_no_padding_and_weights_are_stored_once() -> None:
    model, rows = small("classification", layers=1), rows_for("classification", (3, 9, 9, 1))
    seen = []
    own = unpadded(model)
    transformer_layers(own)[0].attention.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    found = Grouped("packed", HeadedEncoder(own, "classification", "float32").frozen(), "classification").run(rows)
    assert seen == [(1, STEP, 16)], "of 22 tokens"
    matrices = {p.data_ptr() for part in layers_of(model) for p in part.parameters()}
    laid = {p.data_ptr() for part in layers_of(own) for p in part.parameters()}
    assert laid < matrices, "norms alone are the model's own"
    assert {p.data_ptr() for p in own.parameters()} == {p.data_ptr() for p in model.parameters()} - (matrices - laid)
    check(found, model, rows, "classification")
    check(backend("torch", model, "classification").run(rows), model, rows, "classification")


def test_layers_see_few_lengths_whatever_comes() -> None:
    """oneDNN keeps what it made for each of them."""
    model = small("classification", layers=1)
    seen = set[int]()
    own = unpadded(model)
    transformer_layers(own)[0].attention.register_forward_pre_hook(lambda _, given: seen.add(given[0].shape[1]))
    run = Grouped("packed", HeadedEncoder(own, "classification", "float32").frozen(), "classification").run
    for length in range(1, MOST + 1):
        rows = rows_for("classification", (length,) * 3)
        check(run(rows), model, rows, "classification")
    assert seen == set(range(STEP, 3 * MOST + STEP, STEP))


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet"])
def test_products_in_bfloat16_lose_little_and_change_nothing_else(family: str) -> None:
    model, rows = small("classification", family), rows_for("classification", LENGTHS)
    before = [p.clone() for p in model.parameters()]
    exact, rough = (backend(name, model, "classification").run(rows) for name in ("torch", "bf16"))
    off = np.abs(np.stack(exact) - np.stack(rough))
    assert 0 < off.max() < 0.02 * np.abs(np.stack(exact)).max()
    assert all(torch.equal(own, was) for own, was in zip(model.parameters(), before, strict=True))
    kinds = [type(part) for part in layers_of(encoder("bf16", model, "classification").model).modules()]
    assert (Laid in kinds) == (torch.nn.Linear not in kinds) == (family != "mpnet")


def layers_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    return torch.nn.ModuleList(transformer_layers(model))


def test_a_gpu_that_is_not_there_is_named(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"expected a GPU that PyTorch sees, found none: install .* leave --gpus out"):
        choose(str(exported), "classification", (), Hardware(on_gpu=True), "auto")


def test_a_family_with_an_attention_of_its_own_is_padded() -> None:
    with pytest.raises(ModelError, match=r"packed: expected one of bert, .* got mpnet: torch pads it"):
        unpadded(small("classification", "mpnet"))


def test_a_text_may_have_no_place_that_is_wanted() -> None:
    model, (row, other) = small("mlm"), rows_for("mlm", (5, 9))
    nothing = Row(row.ids, places=np.zeros(0, np.int64))
    for rows in ([nothing], [nothing, other]):
        check(backend("packed", model, "mlm").run(rows), model, rows, "mlm")


@given(st.lists(st.integers(1, 70), max_size=40), st.integers(1, 200))
def test_groups_hold_every_row_once_and_little_padding(lengths: list[int], most: int) -> None:
    made = list(groups(lengths, most))
    assert sorted(n for group in made for n in group) == list(range(len(lengths)))
    for group in made:
        assert len(group) == 1 or max(lengths[n] for n in group) * len(group) <= most
    for group, after in pairwise(made):
        assert max(lengths[n] for n in group) * (len(group) + 1) > most
        assert min(lengths[n] for n in group) >= max(lengths[n] for n in after)


# ---- ONNX


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_files_say_what_transformers_says_of_each_row(tmp_path: Path, task: Task) -> None:
    model, rows = small(task, layers=1), rows_for(task, LENGTHS)
    to_onnx(small(task, layers=1), task, tmp_path / "model.onnx", pairs=task == "classification")
    check(Grouped("onnx", OnnxModel(tmp_path / "model.onnx", 1, task), task).run(rows), model, rows, task, 1e-4)
    to_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    said = Grouped("int8", OnnxModel(tmp_path / "int8.onnx", 1, task), task).run(rows)
    expected = [plainly(model, row, task).numpy() for row in rows]
    assert [own.shape for own in said] == [other.shape for other in expected]
    off = np.concatenate([(own - other).ravel() for own, other in zip(said, expected, strict=True)])
    whole = np.concatenate([other[other != NOWHERE] for other in expected])
    assert np.abs(off).max() > 1e-4 and np.abs(off).mean() < 0.1 * np.abs(whole).mean()


# ---- the choice


def scored(folder: Path, lost: float) -> None:
    """As an export leaves it."""
    rows = [{"format": "hf", "score": {"value": 0.9}}]
    for name in ("int8", "bf16"):
        size = (folder / FILES[name]).stat().st_size
        rows.append({"format": name, "score": {"value": 0.9 - lost}, "bytes": size})
    (folder / "raydistil.json").write_text(json.dumps({"artefacts": rows}))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with its ONNX files."""
    folder, model = tmp_path_factory.mktemp("backends"), small("classification", layers=1)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "onnx").mkdir()
    to_onnx(model, "classification", folder / FILES["onnx"], pairs=True)
    to_int8(folder / FILES["onnx"], folder / FILES["int8"])
    to_bf16(folder / "model.safetensors", folder / FILES["bf16"])
    scored(folder, 0.001)
    return folder


@pytest.fixture
def student(exported: Path, tmp_path: Path) -> Path:
    """One of these to be spoilt."""
    return Path(shutil.copytree(exported, tmp_path / "student"))


def chosen(folder: Path, wish: Any, task: Task = "classification") -> Any:
    return choose(str(folder), task, (), ONE, wish)


def test_the_fastest_of_what_is_there_is_taken(exported: Path) -> None:
    found = chosen(exported, "auto")
    assert list(found.rows_s) == ["torch", "packed", "onnx"] and found.left_out == {}
    best = "packed" if found.backend.name == "mixed" else found.backend.name
    assert found.rows_s[best] == max(found.rows_s.values()) and min(found.rows_s.values()) > 0
    model, rows = load_model(str(exported), "classification").eval(), rows_for("classification", LENGTHS)
    for wish in ("torch", "packed", "bf16", "onnx", "int8"):
        own = chosen(exported, wish)
        assert list(own.rows_s) == [wish] and own.backend.name == wish
        if wish not in ROUGH:
            check(own.backend.run(rows), model, rows, "classification", 1e-4)


def test_a_text_alone_may_have_another_backend_than_many(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, rows = chosen(exported, "mixed"), rows_for("classification", LENGTHS)
    assert found.backend.name == "mixed" and list(found.rows_s) == ["packed", "onnx"]
    check(found.backend.run(rows), model := load_model(str(exported), "classification").eval(), rows, "classification")
    for part, asked in (("_alone", rows[:1]), ("_many", rows[:2])):
        with monkeypatch.context() as spoilt:
            spoilt.setattr(found.backend, part, None)
            with pytest.raises(AttributeError):
                found.backend.run(asked)
    check(found.backend.run(rows[:1]), model, rows[:1], "classification", 1e-4)


@pytest.mark.parametrize(("speeds", "name"), [((2.0, 1.0), "packed"), ((2.0, 2.2), "packed"), ((2.0, 2.5), "mixed")])
def test_both_are_kept_where_the_file_is_much_faster_at_one(
    exported: Path, speeds: tuple[float, float], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(backends: dict[str, Any], rows: list[Row]) -> dict[str, float]:
        many = {"torch": 1.0, "packed": 3.0, "onnx": 2.9}
        return many if len(rows) > 1 else dict(zip(("packed", "onnx"), speeds, strict=True))

    monkeypatch.setattr(choice, "_measured", measured)
    assert chosen(exported, "auto").backend.name == name


@pytest.mark.parametrize("task", TASKS)
def test_a_directory_without_files_is_served_by_pytorch(tmp_path: Path, task: Task) -> None:
    small(task, "mpnet").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    found = chosen(tmp_path, "auto", task)
    assert found.backend.name == "torch" and list(found.rows_s) == ["torch"]
    assert list(found.left_out) == ["packed", "onnx"]
    for name in ("onnx", "int8"):
        with pytest.raises(
            ModelError, match=rf"{name}: expected onnx/\w+.onnx in .*, found none: run raydistil export"
        ):
            chosen(tmp_path, name, task)


def other_weights(model: Any) -> None:
    model.classifier.weight.data += 0.01


def more_classes(model: Any) -> None:
    model.config.num_labels, model.classifier = 3, torch.nn.Linear(16, 3)


@pytest.mark.parametrize(("change", "off"), [(other_weights, r"0\.\d+"), (more_classes, "inf")])
def test_a_file_of_another_model_is_not_served(student: Path, change: Any, off: str) -> None:
    model = load_model(str(student), "classification")
    change(model)
    model.save_pretrained(student)
    line = rf"onnx: expected what the checkpoint says within 0.0001, got a difference of {off}: run raydistil export"
    with pytest.raises(ModelError, match=line):
        chosen(student, "onnx")
    found = chosen(student, "auto")
    assert "onnx" not in found.rows_s and re.match(line, found.left_out["onnx"])


@pytest.mark.parametrize(("file", "wish"), [(FILES["onnx"], "onnx"), (FILES["int8"], "int8")])
def test_what_says_no_numbers_is_not_served(student: Path, file: Path, wish: str) -> None:
    proto = onnx.load(str(student / file))
    (bias,) = (tensor for tensor in proto.graph.initializer if tensor.name.endswith("classifier.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([0, np.nan], np.float32), bias.name))
    onnx.save(proto, str(student / file))
    scored(student, 0)
    with pytest.raises(ModelError, match=f"{wish}: expected .*, got a difference of nan"):
        chosen(student, wish)
    model = load_model(str(student), "classification")
    model.classifier.bias.data[1] = torch.nan
    model.save_pretrained(student)
    with pytest.raises(ModelError, match=r"expected a checkpoint that says numbers, the one in .* does not"):
        chosen(student, "auto")


def test_a_file_that_is_broken_is_not_served(student: Path) -> None:
    (student / FILES["onnx"]).write_bytes((student / FILES["onnx"]).read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"onnx: expected a file that runs, got: .*; run raydistil export RUN --to"):
        chosen(student, "onnx")
    assert "onnx" not in chosen(student, "auto").rows_s


def unscored(folder: Path) -> None:
    (folder / "raydistil.json").write_text(json.dumps({"retention": 0.98}))


def unreported(folder: Path) -> None:
    (folder / "raydistil.json").unlink()


def another(folder: Path) -> None:
    (folder / FILES["int8"]).write_bytes((folder / FILES["int8"]).read_bytes() + b"\0")


@pytest.mark.parametrize("spoil", [unscored, unreported, another])
def test_weights_in_eight_bits_are_served_where_their_export_has_scored_them(student: Path, spoil: Any) -> None:
    spoil(student)
    with pytest.raises(ModelError, match=r"int8: expected a file that was scored .* run raydistil export RUN"):
        chosen(student, "int8")
