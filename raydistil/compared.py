"""compared: whether a loss can be had of two models, which differ in depth, width and family."""

from typing import Any

from raydistil.attention import check_attention
from raydistil.config.loss import LossConfig, MiniLMConfig
from raydistil.errors import ConfigError, ModelError
from raydistil.layers import plan_layers
from raydistil.types import Task


def check_losses(task: Task, loss: LossConfig, teacher: Any, student: Any) -> None:
    """Raise where a loss cannot be had of these two models, or of this task."""
    layers = plan_layers(loss, task, False, teacher.num_hidden_layers, student.num_hidden_layers)
    weights = loss.weights()
    if weights["cosine"] and teacher.hidden_size != student.hidden_size:
        raise ModelError(
            f"distill.loss.cosine compares hidden states of one width, got {teacher.hidden_size} in the teacher and "
            f"{student.hidden_size} in the student: set it to 0 and use distill.loss.hidden, which projects them"
        )
    for name in ("triplet", "contrastive"):
        if weights[name] and task != "classification":
            raise ConfigError(f"distill.loss.{name}: expected task classification, got {task}: leave it out")
    if task == "embedding" and weights["kd"] and teacher.hidden_size != student.hidden_size:
        raise ModelError(
            f"distill.loss.kd compares vectors of one width, got {teacher.hidden_size} in the teacher and "
            f"{student.hidden_size} in the student: leave student.hidden_size out"
        )
    for name, pairs in (("attention", layers.attention), ("minilm", layers.minilm)):
        if pairs:
            minilm = loss.minilm if name == "minilm" else None
            _check_attention(minilm, f"distill.loss.{name}", teacher, student)


def _check_attention(minilm: MiniLMConfig | None, key: str, teacher: Any, student: Any) -> None:
    plain = minilm is None or minilm.version == 1
    for shape in (teacher, student):
        check_attention(shape.model_type, plain, key)
    if plain and teacher.num_attention_heads != student.num_attention_heads:
        raise ModelError(
            f"{key}: expected as many attention heads in the student as in the teacher, got "
            f"{student.num_attention_heads} and {teacher.num_attention_heads}: use distill.loss.minilm version 2"
        )
    if minilm is not None and not plain:
        widths = {width for shape in (teacher, student) for width in _attention_widths(shape)}
        if any(width % minilm.relation_heads for width in widths):
            raise ConfigError(
                f"{key}.relation_heads: expected a divisor of {', '.join(map(str, sorted(widths)))}, got "
                f"{minilm.relation_heads}: choose another"
            )


def _attention_widths(shape: Any) -> tuple[int, int]:
    """Of queries, and of keys and values, which have fewer heads in some decoders."""
    head: int = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    keys: int = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    return head * shape.num_attention_heads, head * keys
