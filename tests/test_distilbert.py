"""BERT -> DistilBERT: which weights find a place, and what the student says then."""

from typing import Any

import pytest
import tiny
import torch
from students import built, logits, with_layers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    PreTrainedModel,
)

from raydistil.config.student import StudentConfig
from raydistil.models import num_parameters
from raydistil.student import student_outline

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = tuple(range(6))


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


@pytest.mark.parametrize("rule", [{"layers": (0, 2, 4, 7, 9, 11)}, {"num_layers": 6}])
def test_six_layers_of_bert_base_are_a_distilbert(rule: dict[str, Any]) -> None:
    config = StudentConfig(**rule, family="distilbert")
    with torch.device("meta"):
        published = DistilBertForMaskedLM(DistilBertConfig())
        student = student_outline(BertForMaskedLM(BertConfig()), config, "mlm")
    assert num_parameters(student) == num_parameters(published) == 66_985_530
    shapes = [{name: part.shape for name, part in model.named_parameters()} for model in (student, published)]
    assert shapes[0] == shapes[1]


def test_a_distilbert_with_a_class_head_starts_from_all_a_bert_has_a_place_for() -> None:
    shape = BertConfig(**tiny.SHAPE, num_labels=3, id2label={0: "a", 1: "b", 2: "c"}, classifier_dropout=0.3)
    teacher = tiny.model(shape, "classification")
    student = built(teacher, (0, 5), "classification", family="distilbert")
    assert isinstance(student, DistilBertForSequenceClassification)
    assert student.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert student.config.seq_classif_dropout == 0.3
    given, taken = teacher.state_dict(), student.state_dict()
    for bert, distil in (("bert.pooler.dense", "pre_classifier"), ("classifier", "classifier")):
        assert torch.equal(given[f"{bert}.weight"], taken[f"{distil}.weight"])
        assert torch.equal(given[f"{bert}.bias"], taken[f"{distil}.bias"])


def test_the_class_logits_of_a_distilbert_start_out_like_the_teachers_but_not_equal() -> None:
    """Of Gaussian pooled features x, tanh(x) and relu(x) have a correlation of about 0.86."""
    teacher = tiny.model(BertConfig(**tiny.SHAPE, num_labels=3), "classification")
    with torch.no_grad():
        teacher.bert.embeddings.token_type_embeddings.weight.zero_()
        teacher.bert.pooler.dense.bias.zero_()
        for number, part in enumerate((teacher.bert.pooler.dense, teacher.classifier)):
            generator = torch.Generator().manual_seed(number)
            part.weight.copy_(torch.randn(part.weight.shape, generator=generator) / 4)
    student = built(teacher, ALL, "classification", family="distilbert").eval()
    ids_BL, mask_BL = tiny.ids(rows=200)
    with torch.no_grad():
        a, b = (model(input_ids=ids_BL, attention_mask=mask_BL).logits for model in (teacher, student))
    for column in range(3):
        correlation = float(torch.corrcoef(torch.stack([a[:, column], b[:, column]]))[0, 1])
        assert 0.6 < correlation < 0.99
