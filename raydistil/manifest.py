"""The run's work as a sequence of micro-batches, and the ledger of what is done.

An epoch visits every row of the token store once. A *position* `epoch * num_rows + i` stands for one visit; it maps to
a row by a keyed permutation that is computed, never stored. A *micro-batch* is a fixed group of positions of one
length bucket; the order of the micro-batches of an epoch is a keyed permutation too. So any micro-batch of any epoch
can be made again by anyone, at any time, with the same content. Nothing here depends on how many workers there are.

Permutation: a Feistel network with cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"),
applied at two levels, groups of rows and then rows within a window of groups, so that neighbours in a visit lie in few
places of the file.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

GROUP = 256  # rows that stay in one window
WINDOW = 64  # groups shuffled together

_ROUNDS = 4
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al. 2014): every input bit flips half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_A
    values = (values ^ (values >> np.uint64(27))) * _MIX_B
    return values ^ (values >> np.uint64(31))


def keyed(*parts: int) -> np.uint64:
    """One 64-bit key out of several numbers; the order matters."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = mix(state + _GOLDEN + np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    return np.uint64(state[0])


def permute(indices: Ints, size: int, key: np.uint64) -> Ints:
    """Where a keyed bijection of 0 .. size-1 takes each of `indices` (an int64 array)."""
    if size <= 1:
        return np.asarray(indices, np.int64).copy()
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    values = np.asarray(indices, np.int64).astype(np.uint64)
    values = _feistel(values, half_bits, key)
    outside = values >= size
    while outside.any():  # the cipher works on the next power of four: at most three quarters walk on each time
        values[outside] = _feistel(values[outside], half_bits, key)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half_bits: int, key: np.uint64) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for number in range(_ROUNDS):
        round_key = keyed(int(key), number)
        left, right = right, left ^ (mix(right + round_key) & mask)
    return (left << shift) | right


def shuffle(indices: Ints, size: int, key: np.uint64, group: int = GROUP, window: int = WINDOW) -> Ints:
    """Two-level keyed bijection of 0 .. size-1: groups of rows, then rows within a window of groups.

    The last group may be short. Whichever place it takes, the windows are cut after every `window` groups.
    """
    indices = np.asarray(indices, np.int64)
    num_groups = -(-size // group)
    if num_groups <= window:
        return permute(indices, size, key)
    order = permute(np.arange(num_groups), num_groups, keyed(int(key), 1))
    missing = num_groups * group - size  # rows the short group lacks
    short_place = int(np.flatnonzero(order == num_groups - 1)[0])
    starts = np.arange(num_groups + 1) * group
    starts[short_place + 1 :] -= missing
    result = np.empty_like(indices)
    window_of = (np.searchsorted(starts, indices, side="right") - 1) // window
    for number in np.unique(window_of):
        chosen = window_of == number
        first = starts[number * window]
        end = starts[min((number + 1) * window, num_groups)]
        result[chosen] = first + permute(indices[chosen] - first, int(end - first), keyed(int(key), 2, int(number)))
    places = np.searchsorted(starts, result, side="right") - 1
    return order[places] * group + (result - starts[places])


@dataclass(frozen=True, slots=True)
class Slot:
    """What micro-batch `index` holds: `rows` of `bucket` in the token store, visited at `positions`."""

    index: int
    epoch: int
    bucket: int
    rows: Ints
    positions: Ints


@dataclass(frozen=True, slots=True)
class Manifest:
    """`epochs` visits of the rows of every bucket, `micro_batch_size` (or its own of `bucket_sizes`) at a time.

    The last micro-batch of a bucket may be short. Micro-batches outside of 0 .. `num_micro_batches` - 1 (asked
    for to make up a whole optimizer step) hold nothing.
    """

    bucket_rows: tuple[int, ...]
    epochs: int
    micro_batch_size: int
    seed: int
    bucket_sizes: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(self.bucket_rows)

    @property
    def num_positions(self) -> int:
        return self.num_rows * self.epochs

    @property
    def per_epoch(self) -> int:
        """Micro-batches of one epoch."""
        return sum(self._bucket_micro_batches())

    @property
    def num_micro_batches(self) -> int:
        return self.per_epoch * self.epochs

    @property
    def mean_rows(self) -> float:
        """Rows of a micro-batch; of several sizes the mean, by which every row counts as much as any other."""
        return self.num_rows / self.per_epoch if self.bucket_sizes else self.micro_batch_size

    def size_of(self, bucket: int) -> int:
        """Rows at a time of a bucket."""
        return self.bucket_sizes[bucket] if self.bucket_sizes else self.micro_batch_size

    def slot(self, index: int) -> Slot:
        """The content of micro-batch `index`; empty where there is none."""
        if not 0 <= index < self.num_micro_batches:
            none = np.empty(0, np.int64)
            return Slot(index, self.epochs, len(self.bucket_rows) - 1, none, none)
        epoch, place = divmod(index, self.per_epoch)
        order_key = keyed(self.seed, epoch, -1)
        ordinal = int(permute(np.array([place]), self.per_epoch, order_key)[0])
        bucket, first = self._locate(ordinal)
        size = self.bucket_rows[bucket]
        visits = np.arange(first, min(first + self.size_of(bucket), size))
        rows = shuffle(visits, size, keyed(self.seed, epoch, bucket))
        offset = epoch * self.num_rows + sum(self.bucket_rows[:bucket])
        return Slot(index, epoch, bucket, rows, offset + visits)

    def _bucket_micro_batches(self) -> list[int]:
        return [-(-rows // self.size_of(bucket)) for bucket, rows in enumerate(self.bucket_rows)]

    def _locate(self, ordinal: int) -> tuple[int, int]:
        """(bucket, first visit) of the `ordinal`-th micro-batch before the order is shuffled."""
        for bucket, count in enumerate(self._bucket_micro_batches()):
            if ordinal < count:
                return bucket, ordinal * self.size_of(bucket)
            ordinal -= count
        raise AssertionError("ordinal past the end of the epoch")


@dataclass(frozen=True, slots=True)
class Ledger:
    """The micro-batches a checkpoint has consumed, as ascending disjoint ranges [start, end)."""

    ranges: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return sum(end - start for start, end in self.ranges)

    def __contains__(self, index: int) -> bool:
        return any(start <= index < end for start, end in self.ranges)

    def adding(self, indices: Iterable[int]) -> "Ledger":
        """This ledger with `indices` consumed too. Raises ValueError if one was consumed before."""
        pieces = sorted([*self.ranges, *((index, index + 1) for index in indices)])
        joined: list[tuple[int, int]] = []
        for start, end in pieces:
            if joined and start < joined[-1][1]:
                raise ValueError(f"micro-batch {start} consumed twice")
            if joined and start == joined[-1][1]:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        return Ledger(tuple(joined))

    def done(self, per_step: int) -> int:
        """Optimizer steps that are consumed: all micro-batches from the first on, and no part of one."""
        end = self.ranges[-1][1] if self.ranges else 0
        assert len(self) == end and end % per_step == 0, f"expected whole steps of {per_step}, got {self.ranges}"
        return end // per_step
