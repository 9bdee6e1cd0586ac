"""What a loss sees and what it gives back.

B rows of a micro-batch, L padded length, T real tokens, D hidden size, N compared places (rows of a classification
batch, or tokens), C classes or vocabulary entries, K entries kept of C, A attention heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from raydistil.losses.tied import Tied
from raydistil.types import Mixture, Sparse


@dataclass(frozen=True, slots=True)
class Projection:
    """Logits that are not made yet: `features_ND @ weight_CD.T + bias_C`. A vocabulary makes them too many to keep.

    What there are more of than N (see `places.evened`) counts for nothing.
    """

    features_ND: Tensor
    weight_CD: Tensor
    bias_C: Tensor | None
    dtype: torch.dtype | None = None  # of the matrix products; None: the weight's
    tied: Tied | None = None  # where the weight is also that of the word embeddings

    def __len__(self) -> int:
        return len(self.features_ND)


@dataclass(frozen=True, slots=True)
class Attention:
    """Queries, keys and values of one layer, heads side by side; widths of keys and queries are equal."""

    queries_TD: Tensor
    keys_TD: Tensor
    values_TD: Tensor
    num_heads: int


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What student and teacher say of one micro-batch, float32 (the teacher's logits and projections in any dtype).

    States are by layer: 0 the embeddings, n what layer n made of them, as Hugging Face numbers hidden states.
    """

    student_logits: Tensor | Projection
    labels_N: Tensor  # int64 classes, IGNORE where there is none; of a regression float32 numbers, nan where none is
    teacher_logits: Tensor | Projection | Sparse | Mixture | None = None
    kd_N: Tensor | None = None  # bool: where soft labels are compared; None: everywhere
    student_states: Mapping[int, Tensor] = field(default_factory=dict)  # [T, D] each
    teacher_states: Mapping[int, Tensor] = field(default_factory=dict)
    student_attention: Mapping[int, Attention] = field(default_factory=dict)
    teacher_attention: Mapping[int, Attention] = field(default_factory=dict)
    mask_BL: Tensor | None = None  # bool: which of the tokens are real
    pairs_BLL: Tensor | None = None  # bool: whom each real token may look at; None: all real ones of its row
    projected_states: Mapping[int, Tensor] = field(default_factory=dict)  # the student's in the teacher's width


class LossOutputs(NamedTuple):
    """A scalar to minimise, and detached scalars to log. A tuple, in which DeepSpeed finds the tensors."""

    loss: Tensor
    metrics: dict[str, Tensor]
