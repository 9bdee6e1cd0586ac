"""Whether a new student may go on answering a share of what comes: judged by what all replicas have seen of it."""

import math
from dataclasses import dataclass

CHANCE = 5e-5  # that one within the limits is sent away, each time it is looked at


@dataclass(frozen=True, slots=True)
class Limits:
    errors: float = 0.01  # share of its requests, at most
    disagreement: float = 0.1  # with the student, of the texts that both answered (1 minus `agreement`)


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of the requests that went to it."""

    asked: int = 0
    failed: int = 0
    texts: int = 0  # that the student answered, too
    agreed: float = 0.0

    def __add__(self, other: "Tried") -> "Tried":
        return Tried(
            self.asked + other.asked, self.failed + other.failed, self.texts + other.texts, self.agreed + other.agreed
        )


def verdict(tried: Tried, limits: Limits) -> str | None:
    """Why it has to go; None as long as chance may have made what was seen."""
    if _beyond(tried.failed, tried.asked, limits.errors):
        return f"{tried.failed} of {tried.asked} requests failed, at most {limits.errors:.1%} may"
    if _beyond(tried.texts - tried.agreed, tried.texts, limits.disagreement):
        apart = 1 - tried.agreed / tried.texts
        return f"it disagreed on {apart:.1%} of {tried.texts} texts, at most {limits.disagreement:.1%} may be"
    return None


def _beyond(count: float, of: int, most: float) -> bool:
    """Whether chance makes a mean of `of` numbers from 0 to 1 as high less often than CHANCE, where `most` is what is
    to be expected of each (Hoeffding 1963, theorem 1)."""
    if of == 0 or count / of <= most:
        return False
    if most == 0:
        return True
    share = count / of
    rest = (1 - share) * math.log((1 - share) / (1 - most)) if share < 1 else 0.0
    return of * (share * math.log(share / most) + rest) > -math.log(CHANCE)
