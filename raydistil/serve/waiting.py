"""What waits for the device, which of it goes next, and how long that takes.

The oldest item is in the next batch, whatever its length, and the others are there to make good use of it: with
padding, a batch costs its rows times its longest, so they are chosen by length. Padding is worth its time up to what
another batch would take, which is measured: little on a CPU, thousands of tokens where launching kernels takes longest.
"""

import itertools
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

HALF_S = 1.0
DECAY = 0.95  # a batch counts by this much less with each batch after it


@dataclass(frozen=True, slots=True)
class Limits:
    batch_tokens: int  # what a batch may cost, padding included; a longer item runs alone
    queue_tokens: int  # what may wait, without padding; one request may be more where nothing waits
    age_s: float  # who has waited longer is not passed over for a better fit


@dataclass(slots=True, eq=False)
class Ticket:
    """A place in the queue."""

    number: int  # in order of arrival
    tokens: int
    arrived: float


T = TypeVar("T", bound=Ticket)


@dataclass(slots=True)
class Forming(Generic[T]):
    """A batch that grows; `padded`: every row is as long as the longest."""

    padded: bool
    rows: dict[int, T] = field(default_factory=dict)  # by number
    longest: int = 0
    tokens: int = 0

    def add(self, ticket: T) -> None:
        self.rows[ticket.number] = ticket
        self.longest = max(self.longest, ticket.tokens)
        self.tokens += ticket.tokens

    def cost(self) -> int:
        return len(self.rows) * self.longest if self.padded else self.tokens

    def cost_with(self, tokens: int) -> int:
        return (len(self.rows) + 1) * max(self.longest, tokens) if self.padded else self.tokens + tokens

    def padding_with(self, tokens: int) -> int:
        return self.cost_with(tokens) - self.tokens - tokens


class Queue(Generic[T]):
    """What waits, by age and by length. To add or remove a ticket costs the same however many there are."""

    def __init__(self, limits: Limits, padded: bool) -> None:
        self.tokens = 0
        self._limits, self._padded = limits, padded
        self._sizes: dict[int, OrderedDict[int, T]] = {}  # see `size_of`
        self._lengths: dict[int, OrderedDict[int, T]] = {}  # in each the oldest first

    def __len__(self) -> int:
        return sum(map(len, self._sizes.values()))

    def add(self, ticket: T) -> None:
        self.tokens += ticket.tokens
        length = self._length(ticket)
        self._sizes.setdefault(size_of(length), OrderedDict())[ticket.number] = ticket
        self._lengths.setdefault(length, OrderedDict())[ticket.number] = ticket

    def discard(self, ticket: T) -> None:
        length = self._length(ticket)
        if ticket.number not in self._lengths.get(length, ()):
            return
        self.tokens -= ticket.tokens
        for shelves, key in ((self._sizes, size_of(length)), (self._lengths, length)):
            del shelves[key][ticket.number]
            if not shelves[key]:
                del shelves[key]

    def take(self, now: float, spare: float) -> Forming[T]:
        """The next batch, which leaves the queue. There must be something in it.

        The oldest leads it. Who is overdue and of its size follows, the oldest first. Then come the nearest in length,
        as long as they bring no more than `spare` tokens of padding.
        """
        batch: Forming[T] = Forming(self._padded)
        batch.add(min((next(iter(shelf.values())) for shelf in self._sizes.values()), key=lambda t: t.number))
        self._add_overdue(batch, now)
        self._add_near(batch, spare)
        for ticket in batch.rows.values():
            self.discard(ticket)
        return batch

    def _add_overdue(self, batch: Forming[T], now: float) -> None:
        """Not those of other sizes: under a load that makes everybody wait, most of a batch would be padding."""
        (leader,) = batch.rows.values()
        for ticket in itertools.islice(self._sizes[size_of(self._length(leader))].values(), 1, None):
            late = now - ticket.arrived >= self._limits.age_s
            if not late or batch.cost_with(ticket.tokens) > self._limits.batch_tokens:
                return
            batch.add(ticket)

    def _add_near(self, batch: Forming[T], spare: float) -> None:
        longest = batch.longest if self._padded else 0
        most = batch.cost() - batch.tokens + spare
        for length in sorted(self._lengths, key=lambda n: (abs(n - longest), n)):
            if abs(length - longest) > spare or batch.cost_with(1) > self._limits.batch_tokens:
                return
            for ticket in self._lengths[length].values():
                if ticket.number in batch.rows:
                    continue
                if batch.cost_with(ticket.tokens) > self._limits.batch_tokens or batch.padding_with(length) > most:
                    break
                batch.add(ticket)

    def _length(self, ticket: T) -> int:
        return ticket.tokens if self._padded else 0  # without padding they go together whatever their lengths


def size_of(length: int) -> int:
    """Lengths of the same size differ by less than a quarter."""
    shift = max(0, length.bit_length() - 3)
    return length >> shift << shift


class Speed:
    """What a batch takes: a line over its cost, as it was lately."""

    def __init__(self) -> None:
        self._weight = self._tokens = self._cost = self._seconds = self._cost_squared = self._product = 0.0

    def add(self, tokens: int, cost: int, seconds: float) -> None:
        self._weight = self._weight * DECAY + 1
        self._tokens = self._tokens * DECAY + tokens
        self._cost = self._cost * DECAY + cost
        self._seconds = self._seconds * DECAY + seconds
        self._cost_squared = self._cost_squared * DECAY + cost * cost
        self._product = self._product * DECAY + cost * seconds

    @property
    def rate(self) -> float | None:
        """Tokens without padding in a second; None before the first batch."""
        return self._tokens / self._seconds if self._seconds else None

    def spare(self) -> float:
        """Tokens of padding that take as long as another batch would, and so are worth what they save."""
        slope = self._slope()
        return max(0.0, self._seconds / slope - self._cost) / self._weight if slope else math.inf

    def seconds(self, batches: int, cost: int) -> float:
        """Of so many batches that cost this much together; 0 before the first batch."""
        if not self._weight:
            return 0.0
        slope = self._slope()
        if slope is None:
            return cost * self._seconds / self._cost
        return batches * (self._seconds - slope * self._cost) / self._weight + cost * slope

    def _slope(self) -> float | None:
        """Seconds of a token more; None where batches did not differ, so that it is not known."""
        variance = self._weight * self._cost_squared - self._cost * self._cost
        if variance <= 1e-6 * self._cost * self._cost:
            return None
        slope = (self._weight * self._product - self._cost * self._seconds) / variance
        return min(max(slope, 0.0), self._seconds / self._cost)  # a batch without tokens takes no less than nothing


class Lateness:
    """By how much answers came later than was foreseen, at most; what was is forgotten, by half in `HALF_S`."""

    def __init__(self) -> None:
        self._seconds = self._at = 0.0

    def add(self, now: float, seconds: float) -> None:
        self._seconds, self._at = max(seconds, self.seconds(now)), now

    def seconds(self, now: float) -> float:
        return self._seconds * math.exp2((self._at - now) / HALF_S)
