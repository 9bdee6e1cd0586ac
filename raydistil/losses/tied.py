"""The gradient of a matrix that is both a model's word embeddings and its vocabulary.

Each use has a gradient of the whole matrix. That of the looked-up words is zeros but for a few rows; autograd fills one
with zeros and adds it to the other, which takes a twentieth of a small student's step. Here the head's gradient waits
until the words' is known, which comes last of all in the backward pass, and gets the few rows added.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Tied:
    """Word embeddings that are also the vocabulary; stands between the two in a backward pass."""

    def __init__(self, words: nn.Embedding) -> None:
        """From now on `words` looks up by way of this object."""
        self._padding = words.padding_idx
        self._head_VD: Tensor | None = None
        looked_up: Any = _Lookup.apply
        words.__dict__["forward"] = lambda input: looked_up(input, words.weight, self)

    def leave(self, grad_VD: Tensor) -> None:
        """The head's gradient, for the words' to be added."""
        assert self._head_VD is None, "one head, and a backward pass of the words for each of the head"
        self._head_VD = grad_VD

    def whole(self, ids: Tensor, grad: Tensor, num_words: int) -> Tensor:
        """The gradient [V, D] of both uses. `grad`: [.., D] of what was looked up for `ids` [..]."""
        total_VD, self._head_VD = self._head_VD, None
        if total_VD is None:
            total_VD = grad.new_zeros(num_words, grad.shape[-1])
        ids_T, grad_TD = ids.flatten(), grad.flatten(0, -2)
        if self._padding is not None and bool((there_T := ids_T != self._padding).logical_not().any()):
            ids_T, grad_TD = ids_T[there_T], grad_TD[there_T]
        return total_VD.index_add_(0, ids_T, grad_TD.to(total_VD.dtype))


def tied(words: Any, vocabulary_VE: Tensor) -> Tied | None:
    """Ties the gradients of word embeddings that are the vocabulary; None: they are another matrix, or more than a
    look-up, or on a device where the order in which `index_add_` adds is another every time.
    """
    if type(words) is not nn.Embedding or words.weight is not vocabulary_VE or words.weight.device.type != "cpu":
        return None
    return Tied(words)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VD: Tensor, both: Tied) -> Tensor:
        ctx.ids, ctx.num_words, ctx.both = ids, len(weight_VD), both
        return nn.functional.embedding(ids, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        return None, ctx.both.whole(ctx.ids, grad, ctx.num_words), None
