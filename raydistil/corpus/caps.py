"""How many rows are wanted, in all and of each label."""

from collections import Counter

from raydistil.config import CorpusConfig


class Caps:
    """Counts rows and says which labels still need some."""

    def __init__(self, config: CorpusConfig) -> None:
        self._total = config.max_rows
        self._per_label = config.max_rows_per_label
        self._counts: Counter[str | None] = Counter()

    def count(self, label: str | None) -> None:
        self._counts[label] += 1

    def open(self, label: str | None) -> bool:
        """Whether one more row of `label` is wanted."""
        return not self.full and (self._per_label is None or self._counts[label] < self._per_label)

    @property
    def full(self) -> bool:
        """Whether no row of any label is wanted."""
        return self._total is not None and self._counts.total() >= self._total
