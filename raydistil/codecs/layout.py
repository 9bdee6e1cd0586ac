"""How soft labels lie in a buffer, as far as those must know who handle one without torch."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

Readable = Any  # bytes, memoryview or pyarrow.Buffer: whatever np.frombuffer reads

HEADER_BYTES = 16  # four int32: kind, N places, C classes, and K kept or R draws
LOGITS, TOPK, SAMPLED = 1, 2, 3  # kinds
WIDE = 1 << 16  # with more classes than that, ids are int32 and not uint16
MANY = 255  # with more draws than that, counts are uint16 and not uint8


def joined(parts: Iterable[bytes]) -> bytes:
    """int64 number of parts and the size of each, then the parts, each from a multiple of 8 bytes on."""
    buffers = list(parts)
    header = np.array([len(buffers), *map(len, buffers)], np.int64).tobytes()
    return b"".join([header, *(buffer + bytes(-len(buffer) % 8) for buffer in buffers)])


def parted(buffer: Readable) -> Iterator[Readable]:
    """What `joined` was given, as views."""
    whole = memoryview(buffer)
    count = int(np.frombuffer(whole[:8], np.int64)[0])
    start = 8 * (1 + count)
    for size in np.frombuffer(whole[8:start], np.int64).tolist():
        yield whole[start : start + size]
        start += size + -size % 8
