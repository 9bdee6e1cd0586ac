"""What a model says of a micro-batch beside its hidden states, as [N, C] rows of logits, or of vectors.

| task                         | N                          | C                                                       |
|------------------------------|----------------------------|---------------------------------------------------------|
| classification, regression   | B texts                    | classes, or 1                                           |
| token_classification         | T real tokens              | classes                                                 |
| question_answering           | 2 B: start and end of each | L places; NOWHERE but at [CLS] and the context's tokens |
| embedding                    | B texts                    | D, of length 1                                          |

A language model's vocabulary is too large for that: see `models.vocabulary_head`.
"""

import inspect
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from raydistil.errors import ModelError
from raydistil.types import SENTENCE_LAYOUT, Task, models_language

Pooling = Literal["mean", "cls"]
NOWHERE = -1e4  # e to its power is 0, and fp16 holds it
PREFIX = "pooling_mode_"  # of Sentence Transformers
SHORT = {"cls_token": "cls", "mean_tokens": "mean"}


class Inputs(NamedTuple):
    """What goes into a model: int64 and bool."""

    ids_BL: Tensor
    mask_BL: Tensor
    positions_BL: Tensor | None = None  # of the documents of a causal LM's blocks
    contexts_B: Tensor | None = None  # of pairs and questions: the first token of the second text

    def types_BL(self) -> Tensor:
        """int64: 1 from the second text on (Devlin et al. 2019), padding excluded; 0 where there is none."""
        if self.contexts_B is None:
            return torch.zeros_like(self.ids_BL)
        places_L = torch.arange(self.ids_BL.shape[1], device=self.ids_BL.device)
        return ((places_L[None] >= self.contexts_B[:, None]) & self.mask_BL).long()


def has_types(model: PreTrainedModel) -> bool:
    """Whether it tells the tokens of two texts apart by more than their place."""
    known = "token_type_ids" in inspect.signature(model.forward).parameters
    return known and getattr(model.config, "type_vocab_size", 0) > 1


def said(task: Task, model: PreTrainedModel, out: Any, inputs: Inputs) -> Tensor | None:
    """[N, C] float32 of what `model` gave back; None of a language model."""
    if models_language(task):
        return None
    if task == "embedding":
        return vectors(out.last_hidden_state.float(), inputs.mask_BL, model.config.pooling)
    if task == "question_answering":
        return span_logits(out.start_logits.float(), out.end_logits.float(), inputs)
    logits: Tensor = out.logits.float()
    return logits[inputs.mask_BL] if task == "token_classification" else logits


def span_logits(start_BL: Tensor, end_BL: Tensor, inputs: Inputs) -> Tensor:
    """[2 B, L]: of row b the start at 2 b and the end at 2 b + 1."""
    places_BL = inputs.types_BL().bool()
    places_BL[:, 0] = True
    both_B2L = torch.stack([start_BL, end_BL], 1).masked_fill(~places_BL[:, None], NOWHERE)
    return both_B2L.flatten(0, 1)


def vectors(states_BLD: Tensor, mask_BL: Tensor, pooling: Pooling) -> Tensor:
    """[B, D] of length 1: the first token's state, or the mean of all (Reimers and Gurevych 2019, arXiv:1908.10084)."""
    if pooling == "cls":
        return F.normalize(states_BLD[:, 0], dim=-1)
    weights_BL1 = mask_BL[:, :, None].to(states_BLD.dtype)
    return F.normalize((states_BLD * weights_BL1).sum(1) / weights_BL1.sum(1), dim=-1)


def pooling_of(model: str, config: Any) -> Pooling:
    """As the configuration of a student says, or the layout of Sentence Transformers; else the mean.

    Raises ModelError for a way of pooling that is neither.
    """
    known = getattr(config, "pooling", None)
    if known is not None:
        return _checked(model, known)
    path = cached_file(model, SENTENCE_LAYOUT, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return "mean"
    settings: dict[str, Any] = json.loads(Path(path).read_text())
    chosen = [name.removeprefix(PREFIX) for name, on in settings.items() if name.startswith(PREFIX) and on is True]
    return _checked(model, SHORT.get(chosen[0], chosen[0]) if len(chosen) == 1 else " and ".join(chosen))


def _checked(model: str, pooling: Any) -> Pooling:
    if pooling not in ("mean", "cls"):
        raise ModelError(
            f"{model}: expected vectors that are the mean or the first token's, got {pooling}: use another"
        )
    found: Pooling = pooling
    return found
