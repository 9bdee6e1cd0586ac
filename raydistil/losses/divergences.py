"""Divergences of a student's distribution from a teacher's, both given as logits, with closed-form gradients.

Each function: (student_NC, teacher_NC, temperature) -> (loss_N, grad_NC) where grad_NC = d loss_N / d student_NC, in
the dtype it is given. p is the teacher's distribution softmax(t / T), q the student's softmax(s / T). The factor T^2
(T for total variation) keeps the size of the gradient as T grows (Hinton et al. 2015, arXiv:1503.02531, section 2).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from raydistil.config.loss import LossConfig
from raydistil.types import IGNORE

Graded = tuple[Tensor, Tensor]


def divergence(student_NC: Tensor, teacher_NC: Tensor, config: LossConfig) -> Graded:
    """The one `config` names."""
    match config.divergence:
        case "forward_kl":
            return forward_kl(student_NC, teacher_NC, config.temperature)
        case "reverse_kl":
            return reverse_kl(student_NC, teacher_NC, config.temperature)
        case "jensen_shannon":
            return jensen_shannon(student_NC, teacher_NC, config.temperature, config.beta)
        case "total_variation":
            return total_variation(student_NC, teacher_NC, config.temperature)
        case "mse":
            return logit_mse(student_NC, teacher_NC)


def forward_kl(student_NC: Tensor, teacher_NC: Tensor, temperature: float) -> Graded:
    """T^2 sum p log(p / q) (Hinton et al. 2015). Gradient: T (q - p)."""
    log_q_NC, log_p_NC = _log_softmax(student_NC, temperature), _log_softmax(teacher_NC, temperature)
    p_NC = log_p_NC.exp()
    loss_N = temperature**2 * log_p_NC.sub_(log_q_NC).mul_(p_NC).sum(-1)
    return loss_N, log_q_NC.exp_().sub_(p_NC).mul_(temperature)


def reverse_kl(student_NC: Tensor, teacher_NC: Tensor, temperature: float) -> Graded:
    """T^2 sum q log(q / p) (Gu et al. 2023, arXiv:2306.08543). Gradient: T q (log(q / p) - KL(q || p))."""
    log_q_NC, log_p_NC = _log_softmax(student_NC, temperature), _log_softmax(teacher_NC, temperature)
    q_NC = log_q_NC.exp()
    ratio_NC = log_q_NC.sub_(log_p_NC)
    kl_N = _dot(q_NC, ratio_NC)
    return temperature**2 * kl_N, ratio_NC.sub_(kl_N[:, None]).mul_(q_NC).mul_(temperature)


def jensen_shannon(student_NC: Tensor, teacher_NC: Tensor, temperature: float, beta: float) -> Graded:
    """T^2 [beta KL(p || m) + (1 - beta) KL(q || m)], m = beta p + (1 - beta) q (Agarwal et al. 2023, arXiv:2306.13649).

    Gradient: (1 - beta) T q (log(q / m) - KL(q || m)), as what m changes by sums to nothing.
    """
    log_q_NC, log_p_NC = _log_softmax(student_NC, temperature), _log_softmax(teacher_NC, temperature)
    log_m_NC = torch.logaddexp(log_p_NC + math.log(beta), log_q_NC + math.log1p(-beta))
    q_NC = log_q_NC.exp()
    ratio_NC = log_q_NC.sub_(log_m_NC)
    student_kl_N = _dot(q_NC, ratio_NC)
    teacher_kl_N = _dot(log_p_NC.exp(), log_p_NC.sub_(log_m_NC))
    loss_N = temperature**2 * (beta * teacher_kl_N + (1 - beta) * student_kl_N)
    return loss_N, ratio_NC.sub_(student_kl_N[:, None]).mul_(q_NC).mul_((1 - beta) * temperature)


def total_variation(student_NC: Tensor, teacher_NC: Tensor, temperature: float) -> Graded:
    """T/2 sum |q - p| (Wen et al. 2023, arXiv:2307.15190). Gradient: q (g - sum q g), g = sign(q - p) / 2."""
    q_NC, p_NC = F.softmax(student_NC / temperature, -1), F.softmax(teacher_NC / temperature, -1)
    difference_NC = q_NC - p_NC
    loss_N = 0.5 * temperature * difference_NC.abs().sum(-1)
    slope_NC = difference_NC.sign_().mul_(0.5)
    return loss_N, slope_NC.sub_(_dot(q_NC, slope_NC)[:, None]).mul_(q_NC)


def logit_mse(student_NC: Tensor, teacher_NC: Tensor) -> Graded:
    """Mean over C of (s - t)^2 (Ba and Caruana 2014, arXiv:1312.6184); no temperature. Gradient: 2 (s - t) / C."""
    difference_NC = student_NC - teacher_NC
    return difference_NC.square().mean(-1), difference_NC.mul_(2 / student_NC.shape[-1])


def cross_entropy(student_NC: Tensor, labels_N: Tensor, smoothing: float) -> Graded:
    """-(1 - e) log q_y - e/C sum log q (label smoothing e: Szegedy et al. 2015, arXiv:1512.00567); every row labelled.

    Gradient: q - (1 - e) onehot(y) - e/C.
    """
    assert not (labels_N == IGNORE).any(), "rows without a label are left out before"
    log_q_NC = F.log_softmax(student_NC, -1)
    loss_N = (smoothing - 1) * log_q_NC.gather(-1, labels_N[:, None])[:, 0]
    if smoothing:
        loss_N = loss_N - smoothing * log_q_NC.mean(-1)
    grad_NC = log_q_NC.exp_()
    if smoothing:
        grad_NC.sub_(smoothing / student_NC.shape[-1])
    grad_NC.scatter_add_(-1, labels_N[:, None], torch.full_like(grad_NC[:, :1], smoothing - 1))
    return loss_N, grad_NC


def squared_error(student_N1: Tensor, numbers_N: Tensor) -> Graded:
    """(s - y)^2, the loss of a regression. Gradient: 2 (s - y)."""
    difference_N1 = student_N1 - numbers_N[:, None]
    return difference_N1[:, 0].square(), 2 * difference_N1


def _log_softmax(logits_NC: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits_NC if temperature == 1 else logits_NC / temperature, -1)


def _dot(left_NC: Tensor, right_NC: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(left_NC, right_NC)
    return product
