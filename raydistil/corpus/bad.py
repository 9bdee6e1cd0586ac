"""Rows that cannot be read or used: left out up to a limit, counted and named, never in silence."""

from raydistil.errors import DataError

NAMED = 3


class BadRows:
    """Of one pass over a corpus."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._named: list[str] = []
        self.count = 0

    def add(self, error: DataError, rows: int = 1) -> None:
        """`error` is of so many rows. Raises it where they are too many."""
        self.count += rows
        self._named += [str(error)] if len(self._named) < NAMED else []
        if self.count <= self._most:
            return
        if not self._most:
            raise error
        raise DataError(
            f"expected at most {self._most:,} bad rows (corpus.max_bad_rows), found more; the last one: {error}"
        ) from error

    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        if not self.count:
            return ()
        more = [f"... and {self.count - len(self._named):,} more"] if self.count > len(self._named) else []
        return (f"bad rows left out: {self.count:,} of at most {self._most:,}", *self._named, *more)
