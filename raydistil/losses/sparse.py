"""Distillation from sparse soft labels: the loss of each place and its gradient in closed form.

N places, C classes or vocabulary entries, K entries of the widest place.
"""

import math

import torch
from torch import Tensor

from raydistil.types import Sparse


@torch.no_grad()
def sparse_kl(student_logits_NC: Tensor, sparse: Sparse, temperature: float) -> tuple[Tensor, Tensor]:
    """(loss_N, grad_NC): T^2 KL of teacher and student over K + 1 outcomes, the entries and "any other class".

    With p, tail the teacher's, q = softmax(s / T) and r the sum of q over the classes that are no entry,

        loss = T^2 [sum_k p_k log(p_k / q_k) + tail log(tail / r)]
        grad = T [q_k - p_k] for an entry,  T q_j (1 - tail / r) for any other class j.

    With an entry for every class it is the full KL (Hinton et al. 2015, arXiv:1503.02531). With draws (tail 0) its
    gradient is, on average over the draws, that of the full KL (Anshumann et al. 2025); the loss itself is not, by a
    term without the student.

    Float32, or float64 for float64 logits. One [N, C] tensor is made, the gradient, and one more while it is summed.
    """
    dtype = torch.float64 if student_logits_NC.dtype == torch.float64 else torch.float32
    rest_NC = student_logits_NC.to(dtype, copy=True).div_(temperature)
    probs_NK, tail_N = sparse.probs_NK.to(dtype), sparse.tail_N.to(dtype)
    logits_NK = rest_NC.gather(-1, sparse.ids_NK).where(probs_NK > 0, -math.inf)
    _leave_out(rest_NC, sparse.ids_NK, probs_NK > 0)
    rest_N = rest_NC.logsumexp(-1)
    total_N = torch.logaddexp(logits_NK.logsumexp(-1), rest_N)
    log_q_NK, log_r_N = logits_NK - total_N[:, None], rest_N - total_N

    loss_N = _divergence(probs_NK, log_q_NK).sum(-1) + _divergence(tail_N, log_r_N)
    mass_N = probs_NK.sum(-1) + tail_N  # 1, up to rounding
    share_N = log_r_N.exp() * mass_N - tail_N
    grad_NC = rest_NC.sub_(rest_N.clamp(min=torch.finfo(dtype).min)[:, None]).exp_().mul_(share_N[:, None])
    grad_NC.scatter_add_(-1, sparse.ids_NK, log_q_NK.exp() * mass_N[:, None] - probs_NK)
    return loss_N * temperature**2, grad_NC.mul_(temperature)


def _leave_out(logits_NC: Tensor, ids_NK: Tensor, there_NK: Tensor) -> None:
    """Write -inf at the entries that are there. A minimum, for an id may stand in the padding too."""
    values_NK = torch.where(there_NK, -math.inf, math.inf).to(logits_NC.dtype)
    logits_NC.scatter_reduce_(-1, ids_NK, values_NK, "amin")


def _divergence(probs: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q), 0 where p is 0 whatever q."""
    return torch.xlogy(probs, probs) - probs * log_q.where(probs > 0, 0.0)
