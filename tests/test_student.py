"""Students made of a teacher's layers."""

import copy
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    BertConfig,
    BertForMaskedLM,
    DistilBertForMaskedLM,
    ModernBertConfig,
    PreTrainedModel,
)

from raydistil.config import StudentConfig
from raydistil.errors import ModelError
from raydistil.models import num_parameters
from raydistil.student import build_student, check_layers, check_vocabularies, save_model
from raydistil.types import Task

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = tuple(range(6))
TASKS: tuple[Task, ...] = ("mlm", "classification")


def logits(model: PreTrainedModel) -> Tensor:
    ids_BL, mask_BL = tiny.ids()
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids_BL, attention_mask=mask_BL).logits[mask_BL[:, 0]]
    return found


def built(teacher: PreTrainedModel, layers: tuple[int, ...], task: Task, **keys: object) -> PreTrainedModel:
    return build_student(teacher, StudentConfig.model_validate({"layers": layers, **keys}), task)


def with_layers(teacher: PreTrainedModel, layers: tuple[int, ...]) -> PreTrainedModel:
    """The teacher itself, with all layers but these taken out."""
    cut = copy.deepcopy(teacher)
    for part in cut.modules():
        for name, child in part.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == 6:
                setattr(part, name, nn.ModuleList(child[layer] for layer in layers))
    return cut


# ---- the same family


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


# ---- distilbert


def bert_without_token_types() -> PreTrainedModel:
    teacher = tiny.model(tiny.FAMILIES["bert"], "mlm")
    with torch.no_grad():
        teacher.bert.embeddings.token_type_embeddings.weight.zero_()
    return teacher


def test_a_distilbert_of_all_layers_is_a_bert_without_token_types() -> None:
    teacher = bert_without_token_types()
    student = built(teacher, ALL, "mlm", family="distilbert")
    assert isinstance(student, DistilBertForMaskedLM)
    assert torch.allclose(logits(student), logits(teacher), atol=1e-5)
    assert student.vocab_projector.weight is student.distilbert.embeddings.word_embeddings.weight


def test_a_distilbert_of_some_layers_is_the_bert_without_the_others() -> None:
    teacher = bert_without_token_types()
    student = built(teacher, (1, 5), "mlm", family="distilbert")
    assert torch.allclose(logits(student), logits(with_layers(teacher, (1, 5))), atol=1e-5)


def test_an_untied_bert_gives_an_untied_distilbert() -> None:
    teacher = tiny.model(BertConfig(**tiny.SHAPE, tie_word_embeddings=False), "mlm")
    with torch.no_grad():
        teacher.bert.embeddings.token_type_embeddings.weight.zero_()
    student = built(teacher, ALL, "mlm", family="distilbert")
    assert torch.allclose(logits(student), logits(teacher), atol=1e-5)


def test_the_parameters_of_distilbert() -> None:
    with torch.device("meta"):
        teacher = BertForMaskedLM(BertConfig())
        student = built(teacher, (0, 2, 4, 7, 9, 11), "mlm", family="distilbert")
    assert num_parameters(teacher) == 109_514_298
    assert num_parameters(student) == 66_985_530


# ---- what cannot be


@pytest.mark.parametrize("layers", [(0, 6), (1, 1), (7,)])
def test_layers_out_of_range_or_twice(layers: tuple[int, ...]) -> None:
    expected = (
        f"student.layers: expected distinct layers from 0 to 5 (the teacher has 6), got {list(layers)}: "
        f"choose for example [0, 2, 4]"
    )
    with pytest.raises(ModelError) as caught:
        check_layers(layers, 6)
    assert str(caught.value) == expected
    with pytest.raises(ModelError, match=r"student\.layers"):
        built(tiny.model(tiny.FAMILIES["bert"], "mlm"), layers, "mlm")


@pytest.mark.parametrize("task", TASKS)
def test_a_teacher_whose_layers_are_one(task: Task) -> None:
    teacher = tiny.model(AlbertConfig(**tiny.SHAPE, embedding_size=8), task)
    with pytest.raises(ModelError, match=r"Albert.*: expected its 6 layers in one list, found 0 such lists"):
        built(teacher, (0, 2), task)


def test_a_distilbert_is_made_of_a_bert_with_its_head_alone() -> None:
    for family, task in (("roberta", "mlm"), ("bert", "classification")):
        teacher = tiny.model(tiny.FAMILIES[family], task)
        with pytest.raises(ModelError, match=r"student\.family distilbert: expected a BERT with a masked-LM head"):
            built(teacher, (0,), task, family="distilbert")


def test_a_first_layer_unlike_the_others() -> None:
    """ModernBERT's first layer has no norm before its attention, so another one's has no place there."""
    shape = ModernBertConfig(
        **tiny.SHAPE, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3
    )
    teacher = tiny.model(shape, "classification")
    with pytest.raises(ModelError, match=r"expected a place for every weight, none for model\.layers\.0\.attn_norm"):
        built(teacher, (1, 2), "classification")


def test_a_masked_lm_whose_head_is_unknown() -> None:
    shape = ModernBertConfig(
        **tiny.SHAPE, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3
    )
    with pytest.raises(ModelError, match=r"expected a masked language model like BERT, .*, got ModernBertForMaskedLM"):
        built(tiny.model(shape, "mlm"), (0,), "mlm")


def test_vocabularies_must_agree(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "a")
    tiny.tokenizer(tiny.WORDS[:-1]).save_pretrained(tmp_path / "b")
    used = tiny.tokenizer()
    used(["aa"], padding="max_length", truncation=True, max_length=16)
    used.save_pretrained(tmp_path / "c")
    check_vocabularies(str(tmp_path / "a"), str(tmp_path / "c"))
    expected = f"expected one vocabulary, got 45 tokens in the teacher {tmp_path}/a and 44 in the student {tmp_path}/b"
    with pytest.raises(ModelError, match=expected):
        check_vocabularies(str(tmp_path / "a"), str(tmp_path / "b"))


# ---- a student of its own


def test_a_student_that_starts_from_a_checkpoint(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    start = tiny.model(BertConfig(**{**tiny.SHAPE, "num_hidden_layers": 2}), "mlm")
    save_model(start, str(tmp_path / "tokenizer"), tmp_path / "start")
    teacher = tiny.model(tiny.FAMILIES["bert"], "mlm")
    config = StudentConfig(model=str(tmp_path / "start"))
    student = build_student(teacher, config, "mlm")
    assert torch.equal(logits(student), logits(start))
    check_vocabularies(str(tmp_path / "start"), str(tmp_path / "tokenizer"))
