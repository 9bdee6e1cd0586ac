"""Several teachers as one: the weighted mean of what they hold probable (Hinton et al. 2015, arXiv:1503.02531)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from raydistil.config.loss import LossConfig
from raydistil.types import Mixture, Sparse, TeacherTargets


def mixed_targets(said: Sequence[TeacherTargets], weights: Sequence[float], loss: LossConfig) -> TeacherTargets:
    """The first one's hidden states, and soft labels of all; `weights` sum to 1."""
    if len(said) == 1:
        return said[0]
    labels = [part.soft_labels for part in said]
    sparse = [part for part in labels if isinstance(part, Sparse)]
    if sparse:
        return TeacherTargets(said[0].states, mixed_draws(sparse, weights))
    logits = tuple(part for part in labels if isinstance(part, Tensor))
    temperature = None if loss.divergence == "mse" else loss.temperature
    return TeacherTargets(said[0].states, Mixture(logits, tuple(weights), temperature))


def mixed(mixture: Mixture) -> Tensor:
    """float32 [N, C]: the logits of what they say together."""
    if mixture.temperature is None:
        return mean_logits(mixture.logits, mixture.weights)
    return mixed_logits(mixture.logits, mixture.weights, mixture.temperature)


def mixed_logits(logits: Sequence[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
    """float32 [N, C] logits whose softmax at `temperature` is the weighted mean of all softmaxes at `temperature`."""
    if len(logits) == 1:
        return logits[0].float()
    pairs = zip(logits, weights, strict=True)
    logs = [(part.float() / temperature).log_softmax(-1) + math.log(weight) for part, weight in pairs]
    return temperature * torch.stack(logs).logsumexp(0)


def mean_logits(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """float32 [N, C]: what the squared distance to all of them is least at."""
    return torch.stack([weight * part.float() for part, weight in zip(logits, weights, strict=True)]).sum(0)


def mixed_draws(parts: Sequence[Sparse], weights: Sequence[float]) -> Sparse:
    """The weighted mean of distributions without a tail; what several of them hold is one entry."""
    ids_NK, order_NK = torch.cat([part.ids_NK for part in parts], -1).sort(dim=-1, stable=True)
    weighted = [weight * part.probs_NK for part, weight in zip(parts, weights, strict=True)]
    probs_NK = torch.cat(weighted, -1).gather(-1, order_NK)
    new_NK = torch.ones_like(ids_NK, dtype=torch.bool)
    new_NK[:, 1:] = ids_NK[:, 1:] != ids_NK[:, :-1]
    places_NK = new_NK.cumsum(-1) - 1  # of each entry's id among the distinct ones
    summed_NK = torch.zeros_like(probs_NK).scatter_add_(-1, places_NK, probs_NK)
    distinct_NK = torch.zeros_like(ids_NK).scatter_(-1, places_NK, ids_NK)
    assert not any(part.tail_N.any() for part in parts), "tails of several teachers do not add up"
    return Sparse(distinct_NK, summed_NK, parts[0].tail_N)
