"""How fast the machine could be: the matrix products a training needs, and the rate at which it makes them."""

import statistics
import time
from typing import Any

import torch
from transformers import PreTrainedModel

from raydistil.models import DTYPES, load_model
from raydistil.size import describe_model
from raydistil.specs import TrainRun
from raydistil.types import Precision

SIDE = 2048
ROUNDS = 5


def gemm_rate(precision: Precision, device: str) -> float:
    """FLOPs a second of products of square matrices, the median of a few; on all of torch's threads."""
    left, right = (torch.randn(SIDE, SIDE, device=device).to(DTYPES[precision]) for _ in range(2))
    return 2 * SIDE**3 / statistics.median(_seconds(left, right) for _ in range(ROUNDS + 1))


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    started = time.perf_counter()
    left @ right
    if left.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def needed_flops(planned: TrainRun, length: int, compared: float) -> float:
    """FLOPs a token of rows of `length`: the teacher forward, the student forward and backward, which is twice that.

    `compared`: the share of the tokens at which both vocabulary heads are applied.
    """
    models = (planned.worker.teachers[0].model, planned.worker.init)
    teacher, student = (forward_flops(load_model(model, planned.worker.task), length, compared) for model in models)
    return teacher + 3 * student


def forward_flops(model: PreTrainedModel, length: int, compared: float) -> float:
    """A token's, of a language model whose head is applied at a share `compared` of the tokens."""
    bare: Any = model.base_model
    whole, layers = (describe_model(part, length).flops_per_token for part in (model, bare))
    return layers + compared * (whole - layers)
