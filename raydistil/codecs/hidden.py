"""Codec `hidden`: the last hidden state in fp16, padding left out, and the class logits in float32 where there are any.

2 D bytes a token: 1,536 for BERT-base against 61,044 for its fp16 logits. The student's side holds the teacher's
frozen masked-LM head and makes the logits at just the tokens the loss needs, so nothing is lost but the fp16 rounding.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raydistil.errors import ModelError
from raydistil.types import TeacherTargets

Wire = dict[str, bytes]
COLUMNS = ("hidden", "logits")


def encode(hidden_TD: Tensor, logits_BC: Tensor | None) -> Wire:
    """The columns that cross the wire. Raises ModelError where a hidden state does not fit fp16."""
    half_TD = hidden_TD.to(torch.float16)
    if not torch.isfinite(half_TD).all():
        largest = hidden_TD.abs().max().item()
        raise ModelError(f"expected hidden states that fit fp16 (65,504), got {largest:.4g}: the teacher overflows it")
    logits = b"" if logits_BC is None else logits_BC.float().cpu().numpy().tobytes()
    return {"hidden": half_TD.cpu().numpy().tobytes(), "logits": logits}


def decode(wire: Wire, num_tokens: int, num_rows: int, device: torch.device) -> TeacherTargets:
    """The targets as float32 tensors on `device`."""
    hidden_TD = _tensor(np.frombuffer(wire["hidden"], np.float16).reshape(num_tokens, -1), device)
    if not len(wire["logits"]):
        return TeacherTargets(hidden_TD, None)
    return TeacherTargets(hidden_TD, _tensor(np.frombuffer(wire["logits"], np.float32).reshape(num_rows, -1), device))


def _tensor(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """One copy, out of the object store's read-only memory to the device; widened there."""
    return torch.from_numpy(array.copy()).to(device, non_blocking=True).float()
