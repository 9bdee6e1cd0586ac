"""What a stream did in its steady state: out of a run's trace."""

from dataclasses import dataclass

from raydistil.errors import ConfigError
from raydistil.trace import Record


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a run in which teacher and student both worked. Rows are those of micro-batches."""

    micro_batches: int  # that the student took
    student_rows: int
    teacher_rows: int
    tokens: int  # through the student
    seconds: float
    wait_s: float  # the student's, for targets
    num_bytes: int  # over the wire

    @property
    def tok_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def wait_fraction(self) -> float:
        """Of the student's time."""
        return self.wait_s / self.seconds

    @property
    def balance(self) -> float:
        """Rows the teacher made for each the student took: above 1 the teacher's lead grew, below 1 it was eaten up."""
        return self.teacher_rows / self.student_rows


def window_of(records: list[Record], warm_up: int) -> Window:
    """From the end of the micro-batch number `warm_up` to the last end at which a teacher still had work to do.

    A run's last micro-batches, which come out of what is ready while the teachers are through, are not in it. Raises
    ConfigError where nothing is left.
    """
    taught_until = max(timing.ended_s for record in records for timing in record.taught)
    ends = [record.ended_s for record in records[warm_up - 1 :] if record.ended_s <= taught_until]
    if len(ends) < 2:
        raise ConfigError(
            f"expected a stream that is longer than its warm-up of {warm_up} micro-batches and what is ready when the "
            f"teacher is through, got {len(records)} micro-batches: raise --texts or --seconds, or lower --warm-up"
        )
    begin, end = ends[0], ends[-1]
    inside = [record for record in records if begin < record.ended_s <= end]
    taught = [
        record.num_rows for record in records for timing in record.taught[:1] if begin < timing.ended_s <= end
    ]  # of an ensemble the first one counts: rows, not forward passes
    return Window(
        micro_batches=len(inside), student_rows=sum(record.num_rows for record in inside), teacher_rows=sum(taught),
        tokens=sum(record.tokens for record in inside), seconds=end - begin,
        wait_s=sum(record.started_s - record.asked_s for record in inside),
        num_bytes=sum(record.num_bytes for record in inside),
    )  # fmt: skip
