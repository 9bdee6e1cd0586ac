"""Loading models, and the one view of an encoder and its head that every stage shares."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import BertConfig, DistilBertConfig, PreTrainedConfig

from raydistil.errors import ModelError
from raydistil.models import (
    HeadedEncoder,
    load_model,
    load_tokenizer,
    made_for_training,
    num_parameters,
    on_device,
    outline,
    resolve,
)
from raydistil.types import TokenBatch

pytestmark = pytest.mark.usefixtures("one_thread")

DISTILBERT = DistilBertConfig(vocab_size=45, dim=16, n_layers=3, n_heads=2, hidden_dim=24, max_position_embeddings=32)
FAMILIES: dict[str, PreTrainedConfig] = {**tiny.FAMILIES, "distilbert": DISTILBERT}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A masked language model without a tokenizer, in hub layout."""
    tiny.model(tiny.FAMILIES["bert"], "mlm").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(model: str) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(model, "mlm")
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ---- names


def test_a_model_is_a_directory_a_hub_name_or_part_of_a_package(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == str(tmp_path)
    assert resolve("bert-base-uncased") == "bert-base-uncased"
    assert resolve("package:json") == str(Path(__import__("json").__file__).parent)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("./none", "teacher.model: expected a directory in hub layout, found none at ./none"),
        ("package:nope/model", "teacher.model: the Python package nope is not installed: install nope"),
        ("package:no.pe/model", "teacher.model: the Python package no.pe is not installed"),
        ("package:json/nope", "teacher.model: the package json has no directory 'nope': check the part after the /"),
    ],
)
def test_a_model_that_is_not_there(model: str, expected: str) -> None:
    assert refused(model).startswith(expected)


# ---- loading


def test_a_whole_checkpoint_loads_in_float32(saved: Path) -> None:
    model = load_model(str(saved), "mlm")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    teacher = tiny.model(tiny.FAMILIES["bert"], "mlm").state_dict()
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("model", ["./none", "package:nope/model", "package:json/nope"])
def test_an_error_names_the_key_the_model_came_from(model: str) -> None:
    for load in (lambda: load_model(model, "mlm", key="student.model"), lambda: load_tokenizer(model, "student.model")):
        with pytest.raises(ModelError, match=r"^student\.model: "):
            load()


def test_an_outline_has_shapes_and_no_weights(saved: Path) -> None:
    made, whole = outline(str(saved), "mlm"), load_model(str(saved), "mlm")
    assert {parameter.device.type for parameter in made.parameters()} == {"meta"}
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (made, whole)]
    assert shapes[0] == shapes[1]
    assert outline(str(saved), "classification", 7).config.num_labels == 7
    with pytest.raises(
        ModelError, match=r"^student\.model: expected a mlm model in hub layout, cannot load '\S+/none'"
    ):
        outline(f"{saved.name}/none", "mlm", key="student.model")


def test_labels_name_the_classes(saved: Path) -> None:
    model = load_model(str(saved), "classification", ("a", "b", "c"))
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2}
    ids_BL, mask_BL = tiny.ids()
    assert model(input_ids=ids_BL, attention_mask=mask_BL).logits.shape == (2, 3)


def test_a_broken_checkpoint_is_refused(saved: Path) -> None:
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        weights.write_bytes(content)
        assert refused(str(saved)).startswith("teacher.model: expected a mlm model in hub layout, cannot load")
    weights.unlink()
    assert "no file named model.safetensors" in refused(str(saved))
    weights.write_bytes(whole)
    (saved / "config.json").write_text("{")
    assert "is not a valid JSON file" in refused(str(saved))


def test_a_tokenizer_that_is_not_there_or_broken(saved: Path) -> None:
    with pytest.raises(ModelError, match="expected a tokenizer in hub layout, found no vocabulary"):
        load_tokenizer(str(saved))
    for content in ("{", "{}"):
        (saved / "tokenizer.json").write_text(content)
        with pytest.raises(ModelError, match="expected a tokenizer in hub layout, cannot load"):
            load_tokenizer(str(saved))


# ---- the encoder and its head


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_at_some_tokens_is_the_model_at_those_tokens(family: str) -> None:
    model = tiny.model(FAMILIES[family], "mlm")
    ids_BL, mask_BL = tiny.ids()
    at_T = torch.arange(int(mask_BL.sum())) % 3 == 0
    with torch.no_grad():
        hidden_TD, logits_NV = HeadedEncoder(model, "mlm", "float32")(ids_BL, mask_BL, at_T)
        out = model(input_ids=ids_BL, attention_mask=mask_BL, output_hidden_states=True)
    assert torch.allclose(logits_NV, out.logits[mask_BL][at_T], atol=1e-5)
    assert torch.equal(hidden_TD, out.hidden_states[-1][mask_BL])


@pytest.mark.parametrize("family", FAMILIES)
def test_class_logits_and_hidden_states_without_padding(family: str) -> None:
    model = tiny.model(FAMILIES[family], "classification")
    ids_BL, mask_BL = tiny.ids()
    with torch.no_grad():
        hidden_TD, logits_BC = HeadedEncoder(model, "classification", "float32")(ids_BL, mask_BL, None)
        out = model(input_ids=ids_BL, attention_mask=mask_BL)
        encoded = model.base_model(input_ids=ids_BL, attention_mask=mask_BL)
    assert torch.equal(logits_BC, out.logits)
    assert torch.equal(hidden_TD, encoded.last_hidden_state[mask_BL])
    assert len(hidden_TD) == 9 + 6


def test_padding_changes_nothing() -> None:
    model = HeadedEncoder(tiny.model(tiny.FAMILIES["bert"], "mlm"), "mlm", "float32")
    ids_BL, mask_BL = tiny.ids()
    with torch.no_grad():
        before, none = model(ids_BL, mask_BL, None)
        ids_BL[~mask_BL] = 7
        after, _ = model(ids_BL, mask_BL, None)
    assert none is None
    assert torch.allclose(before, after, atol=1e-6)


def test_bfloat16_is_of_the_products_alone() -> None:
    model = tiny.model(tiny.FAMILIES["bert"], "classification")
    ids_BL, mask_BL = tiny.ids()
    with torch.no_grad():
        exact = HeadedEncoder(model, "classification", "float32")(ids_BL, mask_BL, None)
        rough = HeadedEncoder(model, "classification", "bfloat16")(ids_BL, mask_BL, None)
    for a, b in zip(exact, rough, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert not torch.equal(a, b)
        assert torch.allclose(a, b, atol=0.2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_micro_batch_on_its_device() -> None:
    ids = np.array([[2, 9, 3, 0], [2, 3, 0, 0]], np.int32)
    batch = TokenBatch(0, ids, np.array([3, 2], np.int32), np.array([0, 1], np.int32), None, 2)
    ids_BL, mask_BL = on_device(batch, torch.device("cpu"))
    assert ids_BL.dtype == torch.int64
    assert ids_BL.tolist() == ids.tolist()
    assert mask_BL.tolist() == [[True, True, True, False], [True, True, False, False]]


def test_tied_parameters_count_once() -> None:
    shape = {**tiny.SHAPE, "num_hidden_layers": 1}
    tied = tiny.model(BertConfig(**shape), "mlm")
    apart = tiny.model(BertConfig(**shape, tie_word_embeddings=False), "mlm")
    assert num_parameters(apart) - num_parameters(tied) == 45 * (16 + 1)  # the decoder's weight and bias


# ---- training


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.3, None])
def test_dropout_is_set_for_training_and_left_in_the_configuration(
    tmp_path: Path, family: str, dropout: float | None
) -> None:
    tiny.model(FAMILIES[family], "mlm").save_pretrained(tmp_path / "model")
    before = load_model(str(tmp_path / "model"), "mlm")
    model = made_for_training(load_model(str(tmp_path / "model"), "mlm"), dropout, torch.device("cpu")).train()
    ids_BL, mask_BL = tiny.ids()
    first, second = (model(input_ids=ids_BL, attention_mask=mask_BL).logits for _ in range(2))
    assert torch.equal(first, second) == (dropout == 0)
    model.eval().save_pretrained(tmp_path / "again")
    shapes = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "again")]
    assert shapes[0] == shapes[1]
    logits = model(input_ids=ids_BL, attention_mask=mask_BL).logits
    torch.testing.assert_close(logits, before.eval()(input_ids=ids_BL, attention_mask=mask_BL).logits)
