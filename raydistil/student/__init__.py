"""Building a student of a teacher: fewer layers, a narrower one, or the family's small sister, from its weights.

layers.py      which layers, and the same architecture with those alone
distilbert.py  a BERT's weights in a DistilBERT
narrow.py      smaller hidden size, fewer heads, smaller feed-forward parts
pieces.py      the pieces of a tokenizer that a corpus needs, and its file with those alone
vocabulary.py  a model and its tokenizer with the pieces a corpus uses
"""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from raydistil.config.student import StudentConfig
from raydistil.errors import ModelError
from raydistil.models import load_model, load_tokenizer, outline, vocabulary_head
from raydistil.student.distilbert import distilbert
from raydistil.student.layers import check_layered, chosen_layers, shallower
from raydistil.student.narrow import narrowed, widths
from raydistil.tokens import tokenizer_hash
from raydistil.types import Task, models_language


def check_student(config: StudentConfig, teacher: Any) -> None:
    """Raise ModelError where no such student can be made of a teacher of this configuration."""
    if config.model is not None:
        return
    check_layered(teacher.model_type)
    if config.family == "distilbert" and teacher.model_type != "bert":
        raise ModelError(
            f"student.family distilbert: expected a BERT as teacher, got {teacher.model_type}: use family same"
        )
    chosen_layers(config, teacher.num_hidden_layers)
    if config.is_narrower:
        widths(config, teacher)


def check_vocabularies(teacher: str, other: str, whose: str) -> None:
    """Raise ModelError unless both cut and number texts alike. `whose`: the section of `other`."""
    tokenizer, other_tokenizer = load_tokenizer(teacher), load_tokenizer(other, f"{whose}.model")
    if tokenizer_hash(tokenizer) != tokenizer_hash(other_tokenizer):
        raise ModelError(
            f"{whose}.model: expected one vocabulary, got {len(tokenizer)} tokens in the teacher {teacher} and "
            f"{len(other_tokenizer)} in {other}: use a {whose.partition('.')[0]} with the teacher's tokenizer"
        )


def build_student(teacher: PreTrainedModel, config: StudentConfig, task: Task) -> PreTrainedModel:
    """A new student of `teacher`, float32, on the CPU.

    Raises ModelError for layers out of range, or a teacher that such a student cannot be made from.
    """
    if config.model is not None:
        labels = tuple((teacher.config.id2label or {}).values())
        student = load_model(config.model, task, labels, "student.model")
        _fit_vocabulary(student, teacher, task)
    else:
        student = _of_teacher(teacher, config)
        if teacher.can_generate():
            student.generation_config = copy.deepcopy(teacher.generation_config)
    if models_language(task):
        vocabulary_head(student)
    return student


def _fit_vocabulary(student: PreTrainedModel, teacher: PreTrainedModel, task: Task) -> None:
    """Models of one tokenizer may be padded to different sizes; what they say of tokens is compared one by one."""
    rows = teacher.config.vocab_size
    if models_language(task) and student.config.vocab_size != rows:
        student.resize_token_embeddings(rows, mean_resizing=False)


def take_layers(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Give a `model` the layers and embeddings of another of its shape; its head it keeps."""
    encoder = other.base_model.state_dict()
    layers = {name: tensor for name, tensor in encoder.items() if not name.startswith("pooler.")}
    missing, unexpected = model.base_model.load_state_dict(layers, strict=False)
    assert not unexpected and all(name.startswith("pooler.") for name in missing), "two models of one shape"


def _of_teacher(teacher: PreTrainedModel, config: StudentConfig) -> PreTrainedModel:
    layers = chosen_layers(config, teacher.config.num_hidden_layers)
    if config.family == "distilbert":
        return distilbert(teacher, layers)
    student = shallower(teacher, layers)
    return narrowed(student, widths(config, teacher.config), config.narrow) if config.is_narrower else student


def student_outline(
    teacher: PreTrainedModel, config: StudentConfig, task: Task, num_labels: int | None = None
) -> PreTrainedModel:
    """The shape of the student of a teacher that is on the meta device, which holds no weights; made in no time.

    Raises ModelError as build_student does.
    """
    if config.model is not None:
        student = outline(config.model, task, num_labels, "student.model")
        _fit_vocabulary(student, teacher, task)
    else:
        with torch.device("meta"):
            student = _of_teacher(teacher, config.model_copy(update={"narrow": "random"}))
    if models_language(task):
        vocabulary_head(student)
    return student


def save_model(model: PreTrainedModel, tokenizer_from: str, path: Path) -> None:
    """A directory in hub layout: safetensors, configuration, tokenizer."""
    model.save_pretrained(path)
    load_tokenizer(tokenizer_from).save_pretrained(path)
