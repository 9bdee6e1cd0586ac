"""Tensors as plain bytes and back: one copy off the device, one copy onto it."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from raydistil.codecs.layout import Readable


def to_bytes(*tensors: Tensor) -> bytes:
    """The elements of `tensors`, all on one device, row after row and one tensor after the other, with no padding."""
    parts = [tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in tensors]
    return torch.cat(parts).cpu().numpy().tobytes()


def as_array(buffer: Readable) -> NDArray[np.uint8]:
    """A view of the bytes, read-only where `buffer` is."""
    return np.frombuffer(buffer, np.uint8)


def to_device(array: NDArray[np.uint8], device: torch.device) -> Tensor:
    """The bytes on `device`. On the CPU that is no copy: the tensor is `array`'s memory and must not be written to."""
    return from_dlpack(array).to(device, non_blocking=True)
