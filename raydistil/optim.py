"""Optimizer, schedule and the DeepSpeed configuration they are given to DeepSpeed in."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from raydistil.config.train import TrainConfig

Tree = dict[str, Any]


def deepspeed_config(train: TrainConfig, accumulation: int) -> Tree:
    """The DeepSpeed JSON of a run: ours, with the user's keys merged over it. `accumulation`: on each worker.

    How many rows a micro-batch has is nothing to DeepSpeed but a number to multiply.
    `torch_adam`: DeepSpeed's own Adam would be compiled at the first step, which takes minutes and a compiler.
    """
    ours: Tree = {
        "train_micro_batch_size_per_gpu": 1 if train.micro_batch_tokens else train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": train.lr, "betas": list(train.betas), "eps": train.eps, "weight_decay": train.weight_decay,
                "torch_adam": True, "fused": True,
            },
        },
        "zero_optimization": {"stage": train.zero_stage},
        "steps_per_print": 2**31 - 1,
    }  # fmt: skip
    return merged(ours, train.deepspeed)


def merged(base: Tree, over: Tree) -> Tree:
    """`base` with the keys of `over` over it, section by section."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def leave_out_bad_steps(engine: Any) -> None:
    """Have a DeepSpeed engine that has whole float32 weights skip a step whose gradient is no number, and count it.

    Those of mixed precision, and of ZeRO, do so by themselves.
    """
    if engine.zero_optimization() or not isinstance(engine.optimizer, Optimizer):
        return
    optimizer: Any = engine.optimizer
    step, optimizer.overflow = optimizer.step, False

    def step_or_not() -> None:
        norm = cut(optimizer, engine.module, engine.gradient_clipping() or math.inf)
        optimizer.overflow = not bool(norm.isfinite())
        if not optimizer.overflow:
            step()

    engine.clip_fp32_gradients, optimizer.step = lambda: None, step_or_not


def cut(optimizer: Any, model: nn.Module, longest: float) -> Tensor:
    """Make the gradient no longer than that; returns its norm as it was.

    A fused optimizer cuts it in its own pass over it: one over all of it less.
    """
    norm = nn.utils.get_total_norm([part.grad for part in model.parameters() if part.grad is not None])
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # divides by its grad_scale
        optimizer.grad_scale = ((norm + 1e-6) / longest).clamp(min=1.0)
    else:
        nn.utils.clip_grads_with_norm_(model.parameters(), longest, norm)
    return norm


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms (one-dimensional) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def linear_schedule(num_steps: int, warmup_share: float) -> Callable[[Optimizer], LambdaLR]:
    """Learning rate factor: 0 to 1 over the warm-up, then linearly to 0 at `num_steps`."""
    warmup = round(num_steps * warmup_share)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return max(0.0, (num_steps - step) / max(1, num_steps - warmup))

    return lambda optimizer: LambdaLR(optimizer, factor)
