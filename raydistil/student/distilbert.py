"""A DistilBERT of a BERT's weights (Sanh et al. 2019): some of its layers, no token types, no pooler."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
    PreTrainedModel,
)

from raydistil.errors import ModelError
from raydistil.student.layers import filled

# BERT name -> DistilBERT name, inside a layer and outside.
LAYER_NAMES = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
OTHER_NAMES = {
    "bert.embeddings.word_embeddings": "distilbert.embeddings.word_embeddings",
    "bert.embeddings.position_embeddings": "distilbert.embeddings.position_embeddings",
    "bert.embeddings.LayerNorm": "distilbert.embeddings.LayerNorm",
    "cls.predictions.transform.dense": "vocab_transform",
    "cls.predictions.transform.LayerNorm": "vocab_layer_norm",
    "cls.predictions.decoder": "vocab_projector",
    "bert.pooler.dense": "pre_classifier",
    "classifier": "classifier",
    "qa_outputs": "qa_outputs",
}
KINDS: dict[type[PreTrainedModel], Any] = {
    BertForMaskedLM: DistilBertForMaskedLM, BertForPreTraining: DistilBertForMaskedLM,
    BertForSequenceClassification: DistilBertForSequenceClassification,
    BertForTokenClassification: DistilBertForTokenClassification,
    BertForQuestionAnswering: DistilBertForQuestionAnswering, BertModel: DistilBertModel,
}  # fmt: skip


def distilbert(teacher: PreTrainedModel, layers: tuple[int, ...]) -> PreTrainedModel:
    """A DistilBERT with the teacher's kind of head, or none as it, and `layers` of it.

    With the token types at zero, all layers give the teacher's logits. A head for whole texts' classes is not the same:
    BERT ends in W tanh(P h + p) + w, DistilBERT in W relu(P h + p) + w. P, p, W and w are copied all the same:
    relu keeps the half of every pooled feature that is above zero, so the logits start out correlated with the
    teacher's, not equal to them; training has to do the rest. Token types and, for masked-LM, BERT's pooler have no
    place and are left out.

    Raises ModelError for a teacher that is no BERT with such a head.
    """
    kind = KINDS.get(type(teacher))
    if kind is None:
        raise ModelError(
            f"student.family distilbert: expected a BERT with a head for a task as teacher, got "
            f"{type(teacher).__name__}: use family same"
        )
    student: PreTrainedModel = kind(_config(teacher, len(layers)))
    if isinstance(teacher, BertModel):
        student.config.pooling = teacher.config.pooling
        return filled(student, _bare(teacher.state_dict(), layers), teacher)
    return filled(student, _renamed(teacher.state_dict(), layers), teacher)


def _bare(given: Mapping[str, Tensor], layers: tuple[int, ...]) -> dict[str, Tensor]:
    """Of a model without a head, whose pooler has no part in what it says."""
    inside = {f"bert.{name}": tensor for name, tensor in given.items() if not name.startswith("pooler.")}
    return {name.removeprefix("distilbert."): tensor for name, tensor in _renamed(inside, layers).items()}


def _renamed(given: Mapping[str, Tensor], layers: tuple[int, ...]) -> dict[str, Tensor]:
    names = dict(OTHER_NAMES)
    for place, layer in enumerate(layers):
        for bert, distil in LAYER_NAMES.items():
            names[f"bert.encoder.layer.{layer}.{bert}"] = f"distilbert.transformer.layer.{place}.{distil}"
    found = {}
    for bert, distil in names.items():
        for kind in ("weight", "bias"):
            if f"{bert}.{kind}" in given:
                found[f"{distil}.{kind}"] = given[f"{bert}.{kind}"]
    return found


def _config(teacher: PreTrainedModel, num_layers: int) -> DistilBertConfig:
    bert = teacher.config
    head_dropout = bert.hidden_dropout_prob if bert.classifier_dropout is None else bert.classifier_dropout
    return DistilBertConfig(
        vocab_size=bert.vocab_size, max_position_embeddings=bert.max_position_embeddings, n_layers=num_layers,
        n_heads=bert.num_attention_heads, dim=bert.hidden_size, hidden_dim=bert.intermediate_size,
        dropout=bert.hidden_dropout_prob, attention_dropout=bert.attention_probs_dropout_prob,
        activation=bert.hidden_act, initializer_range=bert.initializer_range, pad_token_id=bert.pad_token_id,
        tie_word_embeddings=bert.tie_word_embeddings, seq_classif_dropout=head_dropout, id2label=bert.id2label,
        label2id=bert.label2id, problem_type=bert.problem_type,
    )  # fmt: skip
