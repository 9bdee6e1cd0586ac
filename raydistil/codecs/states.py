"""Hidden states on the wire, padding left out: `fp16`, `bf16`, or `int8` with one float32 scale a token.

2 D bytes a token, or D + 4. The student's side widens to float32, on its device. T tokens, D hidden size.
"""

from typing import Literal

import torch
from torch import Tensor

from raydistil.codecs.buffers import as_array, to_bytes, to_device
from raydistil.codecs.layout import Readable
from raydistil.errors import ModelError

StateDtype = Literal["fp16", "bf16", "int8"]

_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_LARGEST = {"fp16": "65,504", "bf16": "3.39e+38"}
_LARGEST_CODE = 127  # symmetric: -128 stays unused
_SCALE_BYTES = 4


def bytes_per_token(width: int, dtype: StateDtype) -> int:
    """What one token of `width` numbers costs."""
    return width + _SCALE_BYTES if dtype == "int8" else 2 * width


def encode_states(states_TD: Tensor, dtype: StateDtype) -> bytes:
    """T * bytes_per_token(D, dtype) bytes of states of any floating type on any device.

    Raises ModelError where a state is not finite or beyond what `dtype` holds.
    """
    if dtype == "int8":
        return _encode_int8(states_TD)
    half_TD = states_TD.to(_HALVES[dtype])
    if not torch.isfinite(half_TD).all():
        raise _unfit(states_TD, dtype)
    return to_bytes(half_TD)


def decode_states(buffer: Readable, num_tokens: int, dtype: StateDtype, device: torch.device) -> Tensor:
    """float32 [num_tokens, D] on `device`, num_tokens >= 1; shares no memory with `buffer`, which may be read-only."""
    raw = to_device(as_array(buffer), device)
    if dtype == "int8":
        scales_T1 = raw[: num_tokens * _SCALE_BYTES].view(torch.float32)[:, None]
        return raw[num_tokens * _SCALE_BYTES :].view(torch.int8).view(num_tokens, -1) * scales_T1
    return raw.view(_HALVES[dtype]).view(num_tokens, -1).float()


def _encode_int8(states_TD: Tensor) -> bytes:
    """All scales, then all codes: a state is code * scale, off by half a scale at most."""
    states_TD = states_TD.float()
    largest_T1 = states_TD.abs().amax(-1, keepdim=True)
    if not torch.isfinite(largest_T1).all():
        raise _unfit(states_TD, "int8")
    scales_T1 = (largest_T1 / _LARGEST_CODE).clamp(min=torch.finfo(torch.float32).tiny)
    codes_TD = (states_TD / scales_T1).round().clamp(-_LARGEST_CODE, _LARGEST_CODE)
    return to_bytes(scales_T1, codes_TD.to(torch.int8))


def _unfit(states_TD: Tensor, dtype: StateDtype) -> ModelError:
    largest = states_TD.abs().max().item()
    if not torch.isfinite(states_TD).all():
        return ModelError(
            f"expected finite hidden states, got {largest:.4g}: set teacher.precision to float32, or check the "
            f"teacher's weights"
        )
    others = "int8 or bf16" if dtype == "fp16" else "int8"
    return ModelError(
        f"expected hidden states that fit {dtype} ({_LARGEST[dtype]}), got {largest:.4g}: the teacher overflows it, "
        f"ship {others}"
    )
