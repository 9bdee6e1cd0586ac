"""Loading models, and the one view of an encoder and its head that every stage shares."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from raydistil.attention import attention_of
from raydistil.errors import ModelError
from raydistil.heads import Inputs
from raydistil.models import (
    HeadedEncoder,
    load_model,
    load_tokenizer,
    num_parameters,
    on_device,
    outline,
    resolve,
    transformer_layers,
)
from raydistil.student.training import made_for_training
from raydistil.types import TokenBatch

pytestmark = pytest.mark.usefixtures("one_thread")

DISTILBERT = DistilBertConfig(vocab_size=45, dim=16, n_layers=3, n_heads=2, hidden_dim=24, max_position_embeddings=32)
FAMILIES: dict[str, PreTrainedConfig] = {**tiny.FAMILIES, "distilbert": DISTILBERT}
DEEPER = DistilBertConfig(vocab_size=45, dim=16, n_layers=6, n_heads=2, hidden_dim=24, max_position_embeddings=32)
SMALL = {**tiny.SHAPE, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
CAUSAL = {
    "gpt2": GPT2Config(vocab_size=45, n_embd=16, n_layer=6, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=3),
    "llama": LlamaConfig(**SMALL, num_key_value_heads=1),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=1),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8),
}
LANGUAGE: dict[str, PreTrainedConfig] = {
    **tiny.FAMILIES, "distilbert": DEEPER, "deberta": DebertaV2Config(**tiny.SHAPE, relative_attention=True),
    "deberta as written": DebertaV2Config(**tiny.SHAPE, legacy=False),
    "modernbert": ModernBertConfig(**SMALL, cls_token_id=2, sep_token_id=3), **CAUSAL,
}  # fmt: skip


def test_a_head_of_other_classes_is_made_anew(tmp_path: Path) -> None:
    """And the encoder below it is the checkpoint's; what is no head must have the size its configuration says."""
    model = tiny.model(tiny.FAMILIES["bert"], "classification")
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), "classification", ("a", "b", "c"))
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert again.classifier.weight.shape[0] == 3 != model.classifier.weight.shape[0]
    kept = {name: part for name, part in model.state_dict().items() if not name.startswith("classifier")}
    assert kept and all(torch.equal(part, again.state_dict()[name]) for name, part in kept.items())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 25}))
    with pytest.raises(ModelError, match=r"expected a classification model .* is another than its configuration says"):
        load_model(str(tmp_path), "classification", ("a", "b"))


def test_a_number_is_learned_by_what_told_classes_apart(tmp_path: Path) -> None:
    tiny.model(tiny.FAMILIES["bert"], "classification").save_pretrained(tmp_path)
    again = load_model(str(tmp_path), "regression")
    assert (again.config.num_labels, again.config.problem_type, len(again.classifier.weight)) == (1, "regression", 1)
    again.save_pretrained(tmp_path)
    classes = load_model(str(tmp_path), "classification", ("a", "b"))
    assert (classes.config.problem_type, len(classes.classifier.weight)) == ("single_label_classification", 2)


def causal(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CAUSAL[family], dtype=torch.float32)
    return model.eval()


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


def test_an_outline_has_shapes_and_no_weights(saved: Path, no_pauses: None) -> None:
    made, whole = outline(str(saved), "mlm"), load_model(str(saved), "mlm")
    assert {parameter.device.type for parameter in made.parameters()} == {"meta"}
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (made, whole)]
    assert shapes[0] == shapes[1]
    assert outline(str(saved), "classification", 7).config.num_labels == 7
    with pytest.raises(ModelError, match=r"^student\.model: expected a model in hub layout, cannot load 'model/none'"):
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


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "384"}, {"hidden_size": None}, {"id2label": ["a", "b"]}, {"hidden_act": "nope"}]
)
def test_a_configuration_that_is_none_is_refused(saved: Path, changes: dict[str, Any]) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | changes))
    for load in (load_model, outline):
        with pytest.raises(
            ModelError, match=r"^teacher\.model: expected a .*model in hub layout, cannot load"
        ) as found:
            load(str(saved), "mlm")
        assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"\x80\x04\x95", b"PK\x03\x04 and no more"])
def test_pickled_weights_that_are_none_are_refused(saved: Path, content: bytes) -> None:
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(content)
    assert refused(str(saved)).startswith("teacher.model: expected a mlm model in hub layout, cannot load")


def test_a_tokenizer_that_is_not_there_or_broken(saved: Path) -> None:
    with pytest.raises(ModelError, match="expected a tokenizer in hub layout, found no vocabulary"):
        load_tokenizer(str(saved))
    for content in ("{", "{}"):
        (saved / "tokenizer.json").write_text(content)
        with pytest.raises(ModelError, match="expected a tokenizer in hub layout, cannot load"):
            load_tokenizer(str(saved))


# ---- the encoder and its head


@pytest.mark.parametrize("family", LANGUAGE)
def test_the_head_at_some_tokens_is_the_model_at_those_tokens(family: str) -> None:
    model = tiny.model(LANGUAGE[family], "mlm") if family not in CAUSAL else causal(family)
    encoder = HeadedEncoder(model, "mlm", "float32")
    ids_BL, mask_BL = tiny.ids()
    at_T = torch.arange(int(mask_BL.sum())) % 3 == 0
    with torch.no_grad():
        states, none = encoder(Inputs(ids_BL, mask_BL), (0, 2, 6))
        out = model(input_ids=ids_BL, attention_mask=mask_BL, output_hidden_states=True)
        logits_NV = encoder.vocabulary_logits(states[6][at_T])
    assert none is None
    torch.testing.assert_close(logits_NV, out.logits[mask_BL][at_T], rtol=1e-4, atol=1e-5)
    assert sorted(states) == [0, 2, 6]
    assert all(torch.equal(states[n], out.hidden_states[n][mask_BL]) for n in (0, 2))
    assert all(len(state_TD) == 9 + 6 for state_TD in states.values())


@pytest.mark.parametrize("family", LANGUAGE)
def test_queries_keys_and_values_are_those_of_the_layer(family: str) -> None:
    """Each of them, not one in another's place: what the layer's own matrices (or norms of them) give."""
    model = tiny.model(LANGUAGE[family], "mlm") if family not in CAUSAL else causal(family)
    ids_BL, mask_BL = tiny.ids(rows=1)
    made: dict[str, torch.Tensor] = {}

    def keep(name: str, out: torch.Tensor) -> None:
        made.setdefault(name, out)

    layer = transformer_layers(model)[3]
    for name, part in layer.named_modules():
        part.register_forward_hook(lambda _, given, out, name=name: keep(name, out))
    with torch.no_grad():
        states, _ = HeadedEncoder(model, "mlm", "float32")(Inputs(ids_BL, mask_BL), (3,))
        during = dict(made)
        attention = attention_of(model, 4, states[3])
    three = (attention.queries_TD, attention.keys_TD, attention.values_TD)
    for got_TD, wanted in zip(three, _qkv_of(during), strict=True):
        torch.testing.assert_close(got_TD, wanted[0].flatten(1), rtol=1e-4, atol=1e-5)


QKV = (
    r"(query|query_proj|q|q_lin|q_proj|q_norm)$",
    r"(key|key_proj|k|k_lin|k_proj|k_norm)$",
    r"(value|value_proj|v|v_lin|v_proj)$",
)


def _qkv_of(outputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What the modules of these names gave, the last one of each; or the thirds of one that makes all three."""
    fused = [out for name, out in outputs.items() if name.endswith(("Wqkv", "c_attn"))]
    if fused:
        return list(fused[0].chunk(3, -1))
    return [[out for name, out in outputs.items() if re.search(rf"(^|\.){pattern}", name)][-1] for pattern in QKV]


@pytest.mark.parametrize("family", FAMILIES)
def test_class_logits_and_hidden_states_without_padding(family: str) -> None:
    model = tiny.model(FAMILIES[family], "classification")
    ids_BL, mask_BL = tiny.ids()
    encoder = HeadedEncoder(model, "classification", "float32")
    last = encoder.num_layers
    with torch.no_grad():
        states, logits_BC = encoder(Inputs(ids_BL, mask_BL), (last,))
        out = model(input_ids=ids_BL, attention_mask=mask_BL)
        encoded = model.base_model(input_ids=ids_BL, attention_mask=mask_BL)
    assert torch.equal(logits_BC, out.logits)
    assert torch.equal(states[last], encoded.last_hidden_state[mask_BL])
    assert len(states[last]) == 9 + 6


def test_padding_changes_nothing() -> None:
    model = HeadedEncoder(tiny.model(tiny.FAMILIES["bert"], "mlm"), "mlm", "float32")
    ids_BL, mask_BL = tiny.ids()
    with torch.no_grad():
        before, _ = model(Inputs(ids_BL, mask_BL), (6,))
        ids_BL[~mask_BL] = 7
        after, _ = model(Inputs(ids_BL, mask_BL), (6,))
    assert torch.allclose(before[6], after[6], atol=1e-6)


def test_bfloat16_is_of_the_products_alone() -> None:
    model = tiny.model(tiny.FAMILIES["bert"], "classification")
    ids_BL, mask_BL = tiny.ids()
    with torch.no_grad():
        exact, rough = (
            HeadedEncoder(model, "classification", precision)(Inputs(ids_BL, mask_BL), (6,))
            for precision in ("float32", "bfloat16")
        )
    for a, b in ((exact[0][6], rough[0][6]), (exact[1], rough[1])):
        assert a.dtype == b.dtype == torch.float32
        assert not torch.equal(a, b)
        assert torch.allclose(a, b, atol=0.2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_micro_batch_on_its_device() -> None:
    ids = np.array([[2, 9, 3, 0], [2, 3, 0, 0]], np.int32)
    batch = TokenBatch(0, ids, np.array([3, 2], np.int32), np.array([0, 1], np.int32), None, 2, np.arange(2))
    ids_BL, mask_BL, *_ = on_device(batch, torch.device("cpu"))
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
