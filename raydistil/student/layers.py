"""Which layers a student starts from, and a student of the teacher's own architecture with those layers alone.

Works for any model whose layers sit in one ModuleList: BERT (mBERT), RoBERTa (XLM-R, DistilRoBERTa is six of its
layers), MPNet, ELECTRA, DeBERTa, ModernBERT, and decoders such as GPT-2 (DistilGPT2 is six of its layers), Llama
and Qwen2.
"""

import copy
import re
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from raydistil.config.student import LayerRule, StudentConfig
from raydistil.errors import ModelError
from raydistil.models import layer_list_name

# Lists of a configuration with one entry a layer, in transformers 5.
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")


# ---- the choice


def chosen_layers(config: StudentConfig, num_layers: int) -> tuple[int, ...]:
    """Layers, counted from 0, that a student starts from where the teacher has `num_layers`; all where none are named.

    Raises ModelError for layers out of range or named twice, and for more layers than the teacher or the rule has.
    """
    if config.num_layers is not None:
        return by_rule(config.rule, config.num_layers, num_layers)
    layers = config.layers or tuple(range(num_layers))
    if max(layers) >= num_layers or len(set(layers)) != len(layers):
        raise ModelError(
            f"student.layers: expected distinct layers from 0 to {num_layers - 1} (the teacher has {num_layers}), "
            f"got {list(layers)}: choose for example {list(range(0, num_layers, 2))}"
        )
    return layers


def by_rule(rule: LayerRule, wanted: int, num_layers: int) -> tuple[int, ...]:
    """`wanted` of the layers 0 .. num_layers - 1, ascending.

    uniform      i (num_layers - 1) / (wanted - 1) for i = 0 .. wanted - 1, rounded, halves up: the first, the last and
                 what lies evenly between. 6 of 12 are DistilBERT's 0 2 4 7 9 11; 3 of 6 are 0 3 5; 1 is layer 0.
    every_other  0 2 4 ..., so at most half of the layers, rounded up (Sajjad et al. 2020). The other half, 1 3 5 ...,
                 which PKD-Skip looks at (Sun et al. 2019), can be written as a list.
    first, last  the layers nearest the embeddings (PKD starts from these), or nearest the head.

    Raises ModelError where the teacher has fewer.
    """
    most = (num_layers + 1) // 2 if rule == "every_other" else num_layers
    if wanted > most:
        raise ModelError(
            f"student.num_layers: expected at most {most} for rule {rule} of a teacher with {num_layers} layers, got "
            f"{wanted}: lower it"
        )
    if rule == "uniform":
        gaps = max(1, wanted - 1)
        return tuple((2 * place * (num_layers - 1) + gaps) // (2 * gaps) for place in range(wanted))
    if rule == "every_other":
        return tuple(range(0, 2 * wanted, 2))
    return tuple(range(wanted) if rule == "first" else range(num_layers - wanted, num_layers))


# ---- the student


def check_layered(model_type: str) -> None:
    """Raise ModelError for a teacher of which fewer layers make no smaller student."""
    if model_type == "albert":
        raise ModelError(
            "student: expected a teacher with weights of its own in every layer, got albert: its layers share one set, "
            "so fewer of them save no parameters: use a teacher such as BERT, or student.model"
        )


def shallower(teacher: PreTrainedModel, layers: tuple[int, ...]) -> PreTrainedModel:
    """A new model of the teacher's class and head, float32, with `layers` of it in that order.

    Everything outside the layers (embeddings, relative position tables, head) is copied whole.
    Raises ModelError where the layers are not in one list, or one of them has no place where it would come to lie.
    """
    check_layered(teacher.config.model_type)
    prefix = re.escape(layer_list_name(teacher))
    places = {layer: place for place, layer in enumerate(layers)}
    weights = {}
    for name, tensor in teacher.state_dict().items():
        match = re.match(rf"({prefix}\.)(\d+)(\..*)", name)
        if match is None:
            weights[name] = tensor
        elif int(match[2]) in places:
            weights[f"{match[1]}{places[int(match[2])]}{match[3]}"] = tensor
    return filled(fresh(teacher, _fewer(teacher.config, layers)), weights, teacher)


def fresh(like: PreTrainedModel, config: Any) -> PreTrainedModel:
    """A model of the class of `like`, made from `config`: float32, weights at random."""
    model: PreTrainedModel = type(like)(config).float()
    return model


def _fewer(teacher: Any, layers: tuple[int, ...]) -> Any:
    """The configuration of a model with `layers` of the teacher's. Raises ModelError where a layer's place counts."""
    if getattr(teacher, "scale_attn_by_inverse_layer_idx", False) and layers != tuple(range(len(layers))):
        raise ModelError(
            "student.layers: expected the first layers of a teacher that scales attention by a layer's place "
            f"(scale_attn_by_inverse_layer_idx), got {list(layers)}: use rule first"
        )
    config = copy.deepcopy(teacher)
    for key in PER_LAYER:
        values = getattr(teacher, key, None)
        if isinstance(values, list | tuple) and len(values) == teacher.num_hidden_layers:
            setattr(config, key, [values[layer] for layer in layers])
    config.num_hidden_layers = len(layers)
    return config


def filled(student: PreTrainedModel, weights: dict[str, Tensor], teacher: PreTrainedModel) -> PreTrainedModel:
    """`student` with `weights` of `teacher` copied into it.

    Raises ModelError where a weight has no place, or a place no weight.
    """
    missing, unexpected = student.load_state_dict(weights, strict=False)
    loose = [name for name in missing if name not in _tied(student)]
    if loose or unexpected:
        names = ", ".join((loose + unexpected)[:3])
        raise ModelError(
            f"{type(teacher).__name__}: expected a place for every weight, none for {names}: choose other layers (the "
            f"first one may have to stay first)"
        )
    return student


def _tied(model: nn.Module) -> set[str]:
    """Names of parameters that are also another's: given one of them, the rest is given."""
    places: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        places.setdefault(id(tensor), []).append(name)
    return {name for names in places.values() if len(names) > 1 for name in names}
