"""How fast the machine could be: the rate at which it makes matrix products of this precision."""

import time

import torch

from raydistil.models import DTYPES
from raydistil.types import Precision

SIDES = {"cpu": 1024, "cuda": 8192}  # of square matrices: large enough to be as fast as any
ROUNDS = 5


def gemm_rate(precision: Precision, device: str) -> float:
    """FLOPs a second of products of large square matrices on all of torch's threads: the best of a few.

    The best, since whatever else runs at the same time only ever makes one slower.
    """
    side = SIDES[device]
    left, right = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))
    return 2 * side**3 / min(_seconds(left, right) for _ in range(ROUNDS))


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    started = time.perf_counter()
    left @ right
    if left.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
