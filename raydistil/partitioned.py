"""ZeRO stage 3 (Rajbhandari et al. 2020, arXiv:1910.02054): weights that lie in pieces on all workers.

DeepSpeed brings a module's weights together when the module runs, and finds them by its hooks. What is used in another
way must be announced, or gathered by hand; below stage 3 nothing here does anything.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from raydistil.distiller import Distiller
from raydistil.models import vocabulary_head
from raydistil.types import models_language


def announce(distiller: Distiller) -> None:
    """The vocabulary matrix: the losses put it to use themselves, a few tokens at a time."""
    import deepspeed

    if not models_language(distiller.encoder.task):
        return
    head = vocabulary_head(distiller.model)
    for part in (head.weight_VE, head.bias_V):
        if isinstance(part, nn.Parameter):
            deepspeed.zero.register_external_parameter(distiller, part)


def gathered(model: nn.Module) -> AbstractContextManager[Any]:
    """With all weights of `model` whole, on every worker. All of them must enter it, at the same step."""
    parts = [part for part in model.parameters() if hasattr(part, "ds_id")]
    if not parts:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parts)
    return context


def own_part(parameter: Tensor) -> Tensor:
    """What this worker has of it."""
    return getattr(parameter, "ds_tensor", parameter)
