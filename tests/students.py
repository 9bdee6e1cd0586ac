"""Students of tiny teachers."""

import copy

import tiny
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raydistil.config.student import StudentConfig
from raydistil.student import build_student
from raydistil.types import Task


def logits(model: PreTrainedModel) -> Tensor:
    ids_BL, mask_BL = tiny.ids()
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids_BL, attention_mask=mask_BL.long()).logits[mask_BL[:, 0]]
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
    cut.config.use_cache = False  # a decoder's cache goes by the places its layers had
    if getattr(cut.config, "layer_types", None):  # Qwen2 reads it for every layer it goes through
        cut.config.layer_types = [cut.config.layer_types[layer] for layer in layers]
    return cut
