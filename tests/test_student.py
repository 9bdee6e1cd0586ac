"""Students made of a teacher's layers."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from students import built, logits, with_layers
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    RobertaConfig,
    XLMConfig,
    XLMRobertaConfig,
)

from raydistil.config.student import LayerRule, StudentConfig
from raydistil.errors import ModelError
from raydistil.models import num_parameters, vocabulary_head
from raydistil.student import (
    build_student,
    check_student,
    check_vocabularies,
    chosen_layers,
    save_model,
    shallower,
    student_outline,
)
from raydistil.types import Task

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = tuple(range(6))
TASKS: tuple[Task, ...] = ("mlm", "classification")


MODERN = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
RELATIVE = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}
ENCODERS: dict[str, PreTrainedConfig] = {
    **tiny.FAMILIES,
    "xlm-r": XLMRobertaConfig(**tiny.SHAPE),
    "deberta": DebertaV2Config(**tiny.SHAPE, **RELATIVE, position_buckets=8, conv_kernel_size=3),
    "deberta-untied": DebertaV2Config(**tiny.SHAPE, **RELATIVE, legacy=False),
    "modernbert": ModernBertConfig(**tiny.SHAPE, **MODERN, local_attention=4),
}
GPT2_SHAPE = {"vocab_size": 45, "n_embd": 16, "n_layer": 6, "n_head": 2, "n_positions": 32}
DECODERS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(**GPT2_SHAPE),
    "llama": LlamaConfig(**tiny.SHAPE, num_key_value_heads=1),
    "qwen2": Qwen2Config(
        **tiny.SHAPE, num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_window_layers=3
    ),
}


def perturbed(model: PreTrainedModel) -> PreTrainedModel:
    """With every parameter, biases too, away from where it starts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def check_copied(student: PreTrainedModel, teacher: PreTrainedModel, layers: tuple[int, ...]) -> None:
    """Every weight of the student is the teacher's of the same place, and none is left over."""
    given, taken = teacher.state_dict(), student.state_dict()
    pattern = re.compile(r"(.*?\.(?:layer|layers|h)\.)(\d+)(\..*)")
    sources = {}
    for name in taken:
        match = pattern.fullmatch(name)
        sources[name] = name if match is None else f"{match[1]}{layers[int(match[2])]}{match[3]}"
    assert all(torch.equal(taken[name], given[source]) for name, source in sources.items())
    outside = {name for name in given if not pattern.fullmatch(name)}
    inside = {name for name in given if (match := pattern.fullmatch(name)) and int(match[2]) in layers}
    assert set(sources.values()) == outside | inside
    assert len(inside) > 5 * len(layers) - 2
    assert student.config.num_hidden_layers == len(layers)


# ---- the choice of layers


@pytest.mark.parametrize(
    ("rule", "wanted", "of", "expected"),
    [
        ("uniform", 6, 12, (0, 2, 4, 7, 9, 11)),
        ("uniform", 3, 6, (0, 3, 5)),
        ("uniform", 2, 6, (0, 5)),
        ("uniform", 4, 24, (0, 8, 15, 23)),
        ("uniform", 1, 6, (0,)),
        ("every_other", 6, 12, (0, 2, 4, 6, 8, 10)),
        ("every_other", 3, 5, (0, 2, 4)),
        ("first", 3, 12, (0, 1, 2)),
        ("last", 3, 12, (9, 10, 11)),
    ],
)
def test_layers_by_rule(rule: LayerRule, wanted: int, of: int, expected: tuple[int, ...]) -> None:
    assert chosen_layers(StudentConfig(num_layers=wanted, rule=rule), of) == expected


@given(st.sampled_from(get_args(LayerRule)), st.integers(1, 48), st.integers(1, 48))
def test_a_rule_gives_that_many_ascending_layers_or_says_it_cannot(rule: LayerRule, wanted: int, of: int) -> None:
    config = StudentConfig(num_layers=wanted, rule=rule)
    if wanted > of or (rule == "every_other" and 2 * wanted - 1 > of):
        with pytest.raises(ModelError, match=r"student\.num_layers: expected at most"):
            chosen_layers(config, of)
        return
    layers = chosen_layers(config, of)
    assert len(layers) == wanted
    assert all(a < b for a, b in pairwise((-1, *layers, of)))
    if rule == "uniform" and wanted > 1:
        assert (layers[0], layers[-1]) == (0, of - 1)
        gaps = {b - a for a, b in pairwise(layers)}
        assert max(gaps) - min(gaps) <= 1


# ---- the same family


@pytest.mark.parametrize("layers", [ALL, (0, 2, 3)])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_keeps_its_layers_and_all_around_them(family: str, task: Task, layers: tuple[int, ...]) -> None:
    teacher = tiny.model(ENCODERS[family], task)
    student = built(teacher, layers, task)
    check_copied(student, teacher, layers)
    expected = teacher if layers == ALL else with_layers(teacher, layers)
    assert torch.equal(logits(student), logits(expected))


@pytest.mark.parametrize("layers", [ALL, (0, 2, 3)])
@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_keeps_its_layers_and_all_around_them(family: str, layers: tuple[int, ...]) -> None:
    teacher = perturbed(AutoModelForCausalLM.from_config(DECODERS[family]))
    student = shallower(teacher, layers)
    check_copied(student, teacher, layers)
    expected = teacher if layers == ALL else with_layers(teacher, layers)
    assert torch.equal(logits(student), logits(expected))
    ids_BL, _ = tiny.ids(1)
    assert student.generate(ids_BL, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 12)


def test_what_a_configuration_says_of_each_layer_is_cut_with_them() -> None:
    teacher = AutoModelForCausalLM.from_config(DECODERS["qwen2"])
    assert teacher.config.layer_types == ["full_attention"] * 3 + ["sliding_attention"] * 3
    assert shallower(teacher, (1, 2, 5)).config.layer_types == ["full_attention"] * 2 + ["sliding_attention"]


def test_attention_scaled_by_place_needs_the_first_layers() -> None:
    shape = GPT2Config(**GPT2_SHAPE, scale_attn_by_inverse_layer_idx=True)
    teacher = perturbed(AutoModelForCausalLM.from_config(shape))
    assert torch.equal(logits(shallower(teacher, (0, 1))), logits(with_layers(teacher, (0, 1))))
    with pytest.raises(ModelError, match=r"scales attention by a layer's place .*, got \[0, 2\]: use rule first"):
        shallower(teacher, (0, 2))


@pytest.mark.parametrize(
    ("config", "maker", "whole", "parameters"),
    [
        (GPT2Config(), AutoModelForCausalLM, 124_439_808, 81_912_576),  # DistilGPT2
        # DistilRoBERTa: six layers of 12 * 768^2 + 13 * 768 less
        (RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1), AutoModelForMaskedLM,
         124_697_433, 124_697_433 - 6 * (12 * 768**2 + 13 * 768)),
    ],
)  # fmt: skip
def test_the_parameters_of_small_sisters(config: PreTrainedConfig, maker: Any, whole: int, parameters: int) -> None:
    with torch.device("meta"):
        teacher = maker.from_config(config)
        student = shallower(teacher, chosen_layers(StudentConfig(num_layers=6), 12))
    assert (num_parameters(teacher), num_parameters(student)) == (whole, parameters)


def test_lists_inside_the_layers_are_no_second_list_of_layers() -> None:
    """An adapter of six parts in each of six layers: the layers are found, the adapters have no place."""
    teacher = tiny.model(tiny.FAMILIES["bert"], "mlm")
    for layer in teacher.bert.encoder.layer:
        layer.adapters = nn.ModuleList(nn.Linear(1, 1) for _ in range(6))
    with pytest.raises(ModelError, match=r"every weight, none for bert\.encoder\.layer\.0\.adapters\.0\.weight"):
        shallower(teacher, (0, 1))


@pytest.mark.parametrize("family", ["deberta", "modernbert"])
def test_the_head_of_a_masked_lm(family: str) -> None:
    teacher = tiny.model(ENCODERS[family], "mlm")
    ids_BL, mask_BL = tiny.ids()
    with torch.no_grad():
        out = teacher(input_ids=ids_BL, attention_mask=mask_BL.long())
        hidden_BLD = teacher.base_model(input_ids=ids_BL, attention_mask=mask_BL.long()).last_hidden_state
        assert torch.allclose(vocabulary_head(teacher)(hidden_BLD), out.logits, atol=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_the_chosen_layers_are_copied_exactly(task: Task) -> None:
    teacher = tiny.model(tiny.FAMILIES["bert"], task)
    student = built(teacher, (0, 2, 4), task)
    given, taken = teacher.state_dict(), student.state_dict()
    for place, layer in enumerate((0, 2, 4)):
        names = [name for name in taken if f"encoder.layer.{place}." in name]
        assert len(names) == 16
        for name in names:
            assert torch.equal(taken[name], given[name.replace(f"layer.{place}.", f"layer.{layer}.")])
    rest = [name for name in taken if "encoder.layer." not in name]
    assert rest == [name for name in given if "encoder.layer." not in name]
    assert all(torch.equal(taken[name], given[name]) for name in rest)
    assert not any("layer.3." in name for name in taken)
    assert student.config.num_hidden_layers == 3
    assert teacher.config.num_hidden_layers == 6


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_student_of_all_layers_is_the_teacher(family: str, task: Task) -> None:
    teacher = tiny.model(tiny.FAMILIES[family], task)
    assert torch.equal(logits(built(teacher, ALL, task)), logits(teacher))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("layers", [(0, 2, 4), (5, 1)])
def test_a_student_is_the_teacher_without_the_other_layers(family: str, task: Task, layers: tuple[int, ...]) -> None:
    teacher = tiny.model(tiny.FAMILIES[family], task)
    student = built(teacher, layers, task)
    assert torch.equal(logits(student), logits(with_layers(teacher, layers)))
    assert not torch.equal(logits(student), logits(teacher))


def test_a_student_of_layers_that_attend_near_and_far() -> None:
    shape = ModernBertConfig(
        **tiny.SHAPE, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3, local_attention=4
    )
    teacher = tiny.model(shape, "classification")
    student = built(teacher, (0, 3, 4), "classification")
    assert student.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert torch.equal(logits(student), logits(with_layers(teacher, (0, 3, 4))))


def test_a_student_is_no_view_of_its_teacher() -> None:
    teacher = tiny.model(tiny.FAMILIES["bert"], "mlm")
    before = logits(teacher)
    student = built(teacher, ALL, "mlm")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert torch.equal(logits(teacher), before)


# ---- what cannot be


@pytest.mark.parametrize("layers", [(0, 6), (1, 1), (7,)])
def test_layers_out_of_range_or_twice(layers: tuple[int, ...]) -> None:
    expected = (
        f"student.layers: expected distinct layers from 0 to 5 (the teacher has 6), got {list(layers)}: "
        f"choose for example [0, 2, 4]"
    )
    with pytest.raises(ModelError) as caught:
        chosen_layers(StudentConfig(layers=layers), 6)
    assert str(caught.value) == expected
    with pytest.raises(ModelError, match=r"student\.layers"):
        built(tiny.model(tiny.FAMILIES["bert"], "mlm"), layers, "mlm")


@pytest.mark.parametrize("task", TASKS)
def test_a_teacher_whose_layers_are_one(task: Task) -> None:
    teacher = tiny.model(AlbertConfig(**tiny.SHAPE, embedding_size=8), task)
    with pytest.raises(ModelError, match=r"got albert: its layers share one set, so fewer of them save no parameters"):
        built(teacher, (0, 2), task)


def test_a_distilbert_is_made_of_a_bert_alone() -> None:
    config = StudentConfig(layers=(0,), family="distilbert")
    with pytest.raises(ModelError, match=r"student\.family distilbert: expected a BERT as teacher, got roberta"):
        check_student(config, tiny.FAMILIES["roberta"])
    with pytest.raises(ModelError, match=r"expected a BERT with a head for a task as teacher, got RobertaFor"):
        build_student(tiny.model(tiny.FAMILIES["roberta"], "mlm"), config, "mlm")


def test_a_first_layer_unlike_the_others() -> None:
    """ModernBERT's first layer has no norm before its attention, so another one's has no place there."""
    shape = ModernBertConfig(
        **tiny.SHAPE, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3
    )
    teacher = tiny.model(shape, "classification")
    with pytest.raises(ModelError, match=r"expected a place for every weight, none for model\.layers\.0\.attn_norm"):
        built(teacher, (1, 2), "classification")


@pytest.mark.parametrize("task", TASKS)
def test_the_outline_has_the_students_shape_and_no_weights(task: Task) -> None:
    config = StudentConfig(num_layers=3, hidden_size=8, num_heads=1, ffn_size=6, narrow="svd")
    shape = tiny.FAMILIES["bert"]
    with torch.device("meta"):
        teacher = tiny.model(shape, task)
    outlined, real = student_outline(teacher, config, task), build_student(tiny.model(shape, task), config, task)
    assert {parameter.device.type for parameter in outlined.parameters()} == {"meta"}
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (outlined, real)]
    assert shapes[0] == shapes[1]


def test_an_outline_is_refused_where_the_student_would_be() -> None:
    with torch.device("meta"):
        teacher = tiny.model(ENCODERS["modernbert"], "mlm")
    with pytest.raises(ModelError, match=r"none for model\.layers\.0\.attn_norm\.weight: choose other layers"):
        student_outline(teacher, StudentConfig(num_layers=2, rule="last"), "mlm")


def test_a_masked_lm_whose_head_is_unknown() -> None:
    teacher = tiny.model(XLMConfig(vocab_size=45, emb_dim=16, n_layers=2, n_heads=2), "mlm")
    with pytest.raises(ModelError, match=r"expected a language model like BERT, .*, got XLMWithLMHeadModel"):
        vocabulary_head(teacher)


def test_vocabularies_must_agree(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "a")
    tiny.tokenizer(tiny.WORDS[:-1]).save_pretrained(tmp_path / "b")
    used = tiny.tokenizer()
    used(["aa"], padding="max_length", truncation=True, max_length=16)
    used.save_pretrained(tmp_path / "c")
    check_vocabularies(str(tmp_path / "a"), str(tmp_path / "c"), "student")
    expected = f"expected one vocabulary, got 45 tokens in the teacher {tmp_path}/a and 44 in {tmp_path}/b"
    with pytest.raises(ModelError, match=expected):
        check_vocabularies(str(tmp_path / "a"), str(tmp_path / "b"), "student")


# ---- a student of its own


def test_models_of_one_tokenizer_may_be_padded_to_different_sizes(tmp_path: Path) -> None:
    """What the student says is compared with the teacher's, entry by entry."""
    teacher = tiny.model(BertConfig(**tiny.SHAPE), "mlm")
    for rows in (40, 50):
        other = tiny.model(BertConfig(**tiny.SHAPE | {"vocab_size": rows}), "mlm")
        other.save_pretrained(tmp_path / str(rows))
        config = StudentConfig(model=str(tmp_path / str(rows)))
        student = build_student(teacher, config, "mlm")
        assert vocabulary_head(student).weight_VE.shape == vocabulary_head(teacher).weight_VE.shape
        both = min(rows, 45)
        states = torch.randn(3, 16)
        torch.testing.assert_close(vocabulary_head(student)(states)[:, :both], vocabulary_head(other)(states)[:, :both])
        assert student_outline(teacher, config, "mlm").config.vocab_size == 45
        assert build_student(teacher, config, "classification").config.vocab_size == rows


def test_a_student_that_starts_from_a_checkpoint(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    start = tiny.model(BertConfig(**{**tiny.SHAPE, "num_hidden_layers": 2}), "mlm")
    save_model(start, str(tmp_path / "tokenizer"), tmp_path / "start")
    teacher = tiny.model(tiny.FAMILIES["bert"], "mlm")
    config = StudentConfig(model=str(tmp_path / "start"))
    student = build_student(teacher, config, "mlm")
    assert torch.equal(logits(student), logits(start))
    check_vocabularies(str(tmp_path / "start"), str(tmp_path / "tokenizer"), "student")
