"""A narrower student: fewer hidden units, attention heads and feed-forward neurons than its teacher has.

For encoders built like BERT, where the heads together are as wide as the hidden size. Three starts:

importance  keeps the units that weigh most. A neuron or head counts |what it reads| * |what is made of it|. A hidden
            unit counts the mean square it has after a LayerNorm of weight w and bias b, w^2 + b^2 as a share of all
            units', summed over the LayerNorms, times the root of its shares of the squares of every matrix of the
            encoder that reads or writes it; a head has no say, so that students of one encoder below two heads keep
            the same units. McCarley et al. 2019 prune the same kinds of units. Magnitudes stand in for the gradients
            of Michel et al. 2019 and the activations of Minitron (Muralidharan et al. 2024), so no text is needed.
svd         keeps directions of the hidden space, P [D, D'] with P^T P = 1: what reads hidden states becomes W P, what
            writes them P^T W. A LayerNorm does not commute with a rotation, so this is approximate: its bias becomes
            P^T b, its weight the diagonal of P^T diag(w) P, scaled so that the states keep the length they have along
            P. It is nearly right where LayerNorms treat all units alike; so a quarter of P is the units they treat
            least so, as they are, and the rest the main directions of the word embeddings in the other units.
            Heads, neurons and pooled features go by importance.
random      the narrower shape with fresh weights; the layers chosen only say how many there are.

Units that are left out stop counting in the mean and variance of a LayerNorm: the student is a start, not a copy.

D hidden size, E that of the student, H heads, K size of a head, F feed-forward neurons, V pieces, N units of any kind;
a prime marks the student's.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raydistil.config.student import Narrowing, StudentConfig
from raydistil.errors import ModelError
from raydistil.student.layers import filled, fresh

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet")
# End of a module's name -> what the rows and the columns of its weight stand for ("": nothing that is cut).
AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"\.(query|attn\.q)", ("query", "hidden")),
    (r"\.(key|attn\.k)", ("key", "hidden")),
    (r"\.(value|attn\.v)", ("value", "hidden")),
    (r"(attention\.output\.dense|attn\.o)", ("hidden", "value")),
    (r"\.intermediate\.dense", ("ffn", "hidden")),
    (r"\d\.output\.dense", ("hidden", "ffn")),
    (r"\.relative_attention_bias", ("", "head")),
    (r"(pooler|classifier)\.dense", ("pooled", "hidden")),
    (r"(^classifier|classifier\.out_proj)", ("", "pooled")),
    (r"(transform|lm_head|generator_predictions)\.dense", ("hidden", "hidden")),
    (r"(_embeddings|\.decoder|generator_lm_head)", ("", "hidden")),
    (r"(LayerNorm|layer_norm)", ("hidden",)),
    (r"(lm_head|predictions)", ("",)),
)


@dataclass(frozen=True, slots=True)
class Widths:
    """Sizes of a student's layers."""

    hidden: int
    heads: int
    ffn: int


@dataclass(frozen=True, slots=True)
class Kept:
    """Which units stay, ascending: int64 indices, one tensor a layer where layers differ."""

    hidden: Tensor  # [D']
    pooled: Tensor  # [D']
    heads: list[Tensor]  # [H'] each
    query: list[Tensor]  # [H' K'] each, of queries and keys
    value: list[Tensor]  # [H' K'] each, of values and what reads them
    ffn: list[Tensor]  # [F'] each

    def along(self, axis: str, layer: int) -> Tensor:
        """Indices along an axis of AXES; `layer` -1: outside the layers, where heads are the same in all."""
        if axis in ("hidden", "pooled"):
            return self.hidden if axis == "hidden" else self.pooled
        parts = {"head": self.heads, "query": self.query, "key": self.query, "value": self.value, "ffn": self.ffn}
        return parts[axis][layer]


# ---- sizes


def widths(config: StudentConfig, teacher: Any) -> Widths:
    """The sizes `config` asks for, given the teacher's configuration.

    Raises ModelError for another family, for a size above the teacher's, and where heads and hidden size do not agree.
    """
    _check_family(teacher)
    found = Widths(
        config.hidden_size or teacher.hidden_size, config.num_heads or _num_heads(config, teacher),
        config.ffn_size or teacher.intermediate_size,
    )  # fmt: skip
    limits = {
        "hidden_size": (found.hidden, teacher.hidden_size), "num_heads": (found.heads, teacher.num_attention_heads),
        "ffn_size": (found.ffn, teacher.intermediate_size),
    }  # fmt: skip
    for key, (wanted, most) in limits.items():
        if wanted > most:
            raise ModelError(f"student.{key}: expected at most the teacher's {most}, got {wanted}: lower it")
    _check_heads(found, teacher)
    return found


def _check_family(teacher: Any) -> None:
    if teacher.model_type not in FAMILIES:
        raise ModelError(
            f"student: expected a teacher of type {', '.join(FAMILIES)} for a narrower student, got "
            f"{teacher.model_type}: leave hidden_size, num_heads and ffn_size out, or use student.model"
        )
    if getattr(teacher, "embedding_size", teacher.hidden_size) != teacher.hidden_size:
        raise ModelError(
            f"student: expected a teacher whose embeddings are as wide as its layers for a narrower student, got "
            f"{teacher.embedding_size} and {teacher.hidden_size}: leave hidden_size, num_heads and ffn_size out"
        )


def _head_size(teacher: Any) -> int:
    return int(teacher.hidden_size // teacher.num_attention_heads)


def _num_heads(config: StudentConfig, teacher: Any) -> int:
    """As many heads of the teacher's size as the hidden size holds."""
    hidden, head = config.hidden_size or teacher.hidden_size, _head_size(teacher)
    if hidden % head:
        raise ModelError(
            f"student.hidden_size: expected a multiple of the teacher's head size {head}, got {hidden}: change it, or "
            f"set student.num_heads for smaller heads"
        )
    return int(hidden // head)


def _check_heads(wanted: Widths, teacher: Any) -> None:
    if wanted.hidden % wanted.heads:
        raise ModelError(
            f"student.hidden_size: expected a multiple of the student's {wanted.heads} heads, got {wanted.hidden}: "
            f"change one of them"
        )
    if wanted.hidden // wanted.heads > _head_size(teacher):
        raise ModelError(
            f"student.num_heads: expected heads of at most the teacher's size {_head_size(teacher)}, got "
            f"{wanted.hidden} / {wanted.heads}, since all heads together are as wide as the hidden size: lower "
            f"student.hidden_size to {wanted.heads * _head_size(teacher)}, or keep more heads"
        )


# ---- the student


def narrowed(model: PreTrainedModel, sizes: Widths, how: Narrowing) -> PreTrainedModel:
    """A new model of the class of `model` with these sizes, float32; with `model`'s own sizes, a copy of it."""
    config = copy.deepcopy(model.config)
    config.hidden_size, config.num_attention_heads, config.intermediate_size = sizes.hidden, sizes.heads, sizes.ffn
    if hasattr(config, "embedding_size"):
        config.embedding_size = sizes.hidden
    student = fresh(model, config)
    if how == "random":
        return student
    kept = most_important(model, sizes)
    basis_DE = _directions(model, sizes.hidden) if how == "svd" and sizes.hidden < model.config.hidden_size else None
    return filled(student, dict(_cut(model, kept, basis_DE)), model)


def _cut(model: PreTrainedModel, kept: Kept, basis_DE: tuple[Tensor, float] | None) -> Iterator[tuple[str, Tensor]]:
    """The student's weights by name: rows and columns of the teacher's, or their projections."""
    heads = model.config.num_attention_heads
    before = model.config.hidden_size // heads
    after = len(kept.query[0]) // len(kept.heads[0])
    for name, tensor in model.state_dict().items():
        axes, layer = _axes(name), _layer(name)
        for dim, axis in enumerate(axes[: tensor.dim()]):
            if axis == "hidden" and basis_DE is not None:
                tensor = _projected(tensor, dim, basis_DE, is_scale=len(axes) == 1 and name.endswith("weight"))
            elif axis:
                tensor = tensor.index_select(dim, kept.along(axis, layer))
        # The scores are divided by the root of the head size: what the smaller head divides by less is taken here.
        yield name, tensor * (after / before) ** 0.5 if axes[0] == "query" else tensor


def _axes(name: str) -> tuple[str, ...]:
    module = name.rpartition(".")[0]
    for pattern, axes in AXES:
        if re.search(pattern + "$", module):
            return axes
    raise ModelError(f"student: expected a teacher like BERT for a narrower student, found no rule for its {name}")


def _layer(name: str) -> int:
    match = re.search(r"\.layer\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _in_encoder(name: str) -> bool:
    """Whether a weight is of the embeddings or a layer, not of a head."""
    return _layer(name) >= 0 or "embeddings." in name


# ---- importance


def most_important(model: PreTrainedModel, sizes: Widths) -> Kept:
    """The units of the largest weights, as the module's docstring measures them."""
    config = model.config
    units = _Units(model)
    layers = range(config.num_hidden_layers)
    values = [units.path(layer, "value") for layer in layers]
    heads_LH = torch.stack([value.view(config.num_attention_heads, -1).norm(dim=1) for value in values])
    if config.model_type == "mpnet":  # one table of relative positions for the heads of all layers
        heads_LH = heads_LH.sum(0, keepdim=True).expand_as(heads_LH)
    heads = [_largest(scores_H, sizes.heads) for scores_H in heads_LH]
    each = sizes.hidden // sizes.heads
    return Kept(
        hidden=_largest(units.hidden(), sizes.hidden),
        pooled=_largest(units.pooled(), sizes.hidden),
        heads=heads,
        query=[_inside(units.path(layer, "query"), heads[layer], config, each) for layer in layers],
        value=[_inside(values[layer], heads[layer], config, each) for layer in layers],
        ffn=[_largest(units.path(layer, "ffn"), sizes.ffn) for layer in layers],
    )


def _largest(scores_N: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, ascending; of equals the first."""
    return scores_N.argsort(descending=True, stable=True)[:count].sort().values


def _inside(scores_N: Tensor, heads_H: Tensor, config: Any, each: int) -> Tensor:
    """Indices [H' K'] of the `each` largest units of every head that stays."""
    size = _head_size(config)
    scores_HK = scores_N.view(-1, size)
    return torch.cat([int(head) * size + _largest(scores_HK[head], each) for head in heads_H])


class _Units:
    """How much the units of a model weigh."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._parameters = [(name, _axes(name), tensor.detach()) for name, tensor in model.named_parameters()]

    def path(self, layer: int, axis: str) -> Tensor:
        """[N] of one layer: |what a unit reads, its bias included| * |what is made of it|.

        For "query", what is made of a unit is its product with the key's unit of the same place.
        """
        read, made = ("query", "key") if axis == "query" else (axis, axis)
        rows = self._squares(layer, read, 0)
        others = self._squares(layer, made, 0) if axis == "query" else self._squares(layer, made, 1)
        return (rows * others).sqrt()

    def pooled(self) -> Tensor:
        """[D] of the dense layer before a class head; zeros where there is none."""
        if not any("pooled" in axes for _, axes, _ in self._parameters):
            return torch.zeros(self._model.config.hidden_size)
        return self.path(-1, "pooled")

    def hidden(self) -> Tensor:
        """[D] mean square after the LayerNorms, times the root of the share of the matrices' squares."""
        squares_ND = torch.stack([w.square() + b.square() for w, b in layer_norms(self._model)])
        held_D = (squares_ND / squares_ND.sum(1, keepdim=True)).sum(0)
        shares_D = torch.zeros(self._model.config.hidden_size)
        for name, axes, tensor in self._parameters:
            for dim, axis in enumerate(axes):
                if axis == "hidden" and tensor.dim() == 2 and _in_encoder(name):
                    squares_D = tensor.square().sum(1 - dim)
                    shares_D += squares_D / squares_D.sum().clamp_min(torch.finfo(tensor.dtype).tiny)
        return held_D * shares_D.sqrt()

    def _squares(self, layer: int, axis: str, dim: int) -> Tensor:
        """[N] sums of squares, along an axis that lies in this dimension, of the weight and (dim 0) the bias."""
        found = [
            tensor.square() if tensor.dim() == 1 else tensor.square().sum(1 - dim)
            for name, axes, tensor in self._parameters
            if _layer(name) == layer and dim < tensor.dim() and axes[dim] == axis
        ]
        return torch.stack(found).sum(0)


# ---- svd


def _directions(model: PreTrainedModel, hidden: int) -> tuple[Tensor, float]:
    """(P [D, D'], factor): the directions that stay, and how much longer than a student's normalised state the
    teacher's is along them, sqrt(share of the embeddings' squares * D / D').

    The main directions give the best approximation of that rank (Eckart and Young 1936).
    """
    embeddings: Any = model.get_input_embeddings()
    table_VD = embeddings.weight.detach().double()
    order_D = unlike_units(model).argsort(descending=True, stable=True)
    apart, rest = order_D[: hidden // 4], order_D[hidden // 4 :]
    _, vectors = torch.linalg.eigh(table_VD[:, rest].T @ table_VD[:, rest])  # columns, from the least to the main
    basis_DE = torch.zeros(table_VD.shape[1], hidden, dtype=torch.float64)
    basis_DE[apart, torch.arange(len(apart))] = 1
    basis_DE[rest, len(apart) :] = vectors[:, len(apart) - hidden :].flip(1)
    share = float((table_VD @ basis_DE).square().sum() / table_VD.square().sum())
    return basis_DE.float(), (share * table_VD.shape[1] / hidden) ** 0.5


def unlike_units(model: PreTrainedModel) -> Tensor:
    """[D] how far LayerNorms treat a unit unlike the median one: (w / median - 1)^2 + b^2, summed over them."""
    return torch.stack([(w / w.median() - 1).square() + b.square() for w, b in layer_norms(model)]).sum(0)


def layer_norms(model: PreTrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """(weight [D], bias [D]) of those between the layers, that is of the hidden states; none of a head's."""
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if _axes(name) == ("hidden",) and name.endswith(".weight") and _in_encoder(name):
            yield weight.detach(), weights[name.removesuffix("weight") + "bias"].detach()


def _projected(tensor: Tensor, dim: int, basis_DE: tuple[Tensor, float], is_scale: bool) -> Tensor:
    """`tensor` with its dimension `dim` expressed along P; `is_scale`: the weight of a LayerNorm."""
    basis, factor = basis_DE
    if is_scale:
        return factor * (tensor @ basis.square())
    return (tensor.movedim(dim, -1) @ basis).movedim(-1, dim)
