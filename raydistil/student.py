"""Building a student: fewer layers of the teacher, with the teacher's weights in those that are kept.

`same` keeps the architecture, whatever it is, as long as its layers sit in one ModuleList. `distilbert` turns a BERT
with a masked-LM head into a DistilBertForMaskedLM, without token types and pooler (Sanh et al. 2019).
"""

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedModel,
)

from raydistil.config import StudentConfig
from raydistil.errors import ModelError
from raydistil.models import load_model, load_tokenizer, vocabulary_head
from raydistil.tokens import tokenizer_hash
from raydistil.types import Task

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
}


def check_layers(layers: tuple[int, ...], num_layers: int) -> None:
    """Raise ModelError unless `layers` are distinct layers of a teacher that has `num_layers`."""
    wrong = [layer for layer in layers if layer >= num_layers]
    if wrong or len(set(layers)) != len(layers):
        raise ModelError(
            f"student.layers: expected distinct layers from 0 to {num_layers - 1} (the teacher has {num_layers}), "
            f"got {list(layers)}: choose for example {_example(num_layers)}"
        )


def check_family(config: StudentConfig, model_type: str, task: Task) -> None:
    """Raise ModelError where no student of `config.family` can be made of such a teacher."""
    if config.family == "distilbert" and config.model is None and (task, model_type) != ("mlm", "bert"):
        raise ModelError(
            f"student.family distilbert: expected a BERT with a masked-LM head as teacher, got {model_type} for task "
            f"{task}: use family same"
        )


def _example(num_layers: int) -> list[int]:
    return list(range(0, num_layers, 2))


def check_vocabularies(teacher: str, student: str) -> None:
    """Raise ModelError unless both cut and number texts alike."""
    teacher_tokenizer, student_tokenizer = load_tokenizer(teacher), load_tokenizer(student)
    if tokenizer_hash(teacher_tokenizer) != tokenizer_hash(student_tokenizer):
        raise ModelError(
            f"expected one vocabulary, got {len(teacher_tokenizer)} tokens in the teacher {teacher} and "
            f"{len(student_tokenizer)} in the student {student}: use a student with the teacher's tokenizer"
        )


def build_student(teacher: PreTrainedModel, config: StudentConfig, task: Task) -> PreTrainedModel:
    """A new student of `teacher`, float32, on the CPU.

    Raises ModelError for layers out of range, or a teacher that the family cannot be made from.
    """
    if config.model is not None:
        student = load_model(config.model, task, tuple((teacher.config.id2label or {}).values()))
    else:
        check_layers(config.layers, teacher.config.num_hidden_layers)
        student = _from_layers(teacher, config, task)
    if task == "mlm":
        vocabulary_head(student)
    return student


def _from_layers(teacher: PreTrainedModel, config: StudentConfig, task: Task) -> PreTrainedModel:
    if config.family == "distilbert":
        student, weights = _distilbert(teacher, config.layers)
    else:
        student, weights = _shallower(teacher, config.layers, task)
    missing, unexpected = student.load_state_dict(weights, strict=False)
    loose = [name for name in missing if name not in _tied(student)]
    if loose or unexpected:
        names = ", ".join((loose + unexpected)[:3])
        raise ModelError(
            f"{type(teacher).__name__}: expected a place for every weight, none for {names}: choose others"
        )
    return student


def _tied(model: nn.Module) -> set[str]:
    """Names of parameters that share their memory with another: given one of them, the rest is given."""
    named = model.state_dict(keep_vars=True)
    places: dict[int, list[str]] = {}
    for name, tensor in named.items():
        places.setdefault(tensor.data_ptr(), []).append(name)
    return {name for names in places.values() if len(names) > 1 for name in names}


def _shallower(
    teacher: PreTrainedModel, layers: tuple[int, ...], task: Task
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None) is not None:  # ModernBERT: which layers attend far
        config.layer_types = [config.layer_types[layer] for layer in layers]
    maker: Any = AutoModelForMaskedLM if task == "mlm" else AutoModelForSequenceClassification
    student: PreTrainedModel = maker.from_config(config, dtype=torch.float32)
    prefix = re.escape(_layer_list(teacher))
    places = {layer: place for place, layer in enumerate(layers)}
    weights = {}
    for name, tensor in teacher.state_dict().items():
        match = re.match(rf"({prefix}\.)(\d+)(\..*)", name)
        if match is None:
            weights[name] = tensor
        elif int(match[2]) in places:
            weights[f"{match[1]}{places[int(match[2])]}{match[3]}"] = tensor
    return student, weights


def _layer_list(model: PreTrainedModel) -> str:
    """Dotted name of the one ModuleList that holds the layers. Raises ModelError where there is no such list."""
    depth = model.config.num_hidden_layers
    names = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    if len(names) != 1:
        raise ModelError(
            f"{type(model).__name__}: expected its {depth} layers in one list, found {len(names)} such lists: "
            f"use a teacher such as BERT, RoBERTa, MPNet or ELECTRA"
        )
    return str(names[0])


def _distilbert(teacher: PreTrainedModel, layers: tuple[int, ...]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    if teacher.config.model_type != "bert" or not hasattr(teacher, "cls"):
        raise ModelError(
            f"student.family distilbert: expected a BERT with a masked-LM head as teacher, got "
            f"{type(teacher).__name__}: use family same"
        )
    student = DistilBertForMaskedLM(_distilbert_config(teacher, len(layers)))
    given = teacher.state_dict()
    weights = {}
    for bert, distil in OTHER_NAMES.items():
        for kind in ("weight", "bias"):
            if f"{bert}.{kind}" in given:
                weights[f"{distil}.{kind}"] = given[f"{bert}.{kind}"]
    for place, layer in enumerate(layers):
        for bert, distil in LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                weights[f"distilbert.transformer.layer.{place}.{distil}.{kind}"] = given[
                    f"bert.encoder.layer.{layer}.{bert}.{kind}"
                ]
    return student, weights


def _distilbert_config(teacher: PreTrainedModel, num_layers: int) -> DistilBertConfig:
    bert = teacher.config
    return DistilBertConfig(
        vocab_size=bert.vocab_size, max_position_embeddings=bert.max_position_embeddings, n_layers=num_layers,
        n_heads=bert.num_attention_heads, dim=bert.hidden_size, hidden_dim=bert.intermediate_size,
        dropout=bert.hidden_dropout_prob, attention_dropout=bert.attention_probs_dropout_prob,
        activation=bert.hidden_act, initializer_range=bert.initializer_range, pad_token_id=bert.pad_token_id,
        tie_word_embeddings=bert.tie_word_embeddings,
    )  # fmt: skip


def save_model(model: PreTrainedModel, tokenizer_from: str, path: Path) -> None:
    """A directory in hub layout: safetensors, configuration, tokenizer."""
    model.save_pretrained(path)
    load_tokenizer(tokenizer_from).save_pretrained(path)
