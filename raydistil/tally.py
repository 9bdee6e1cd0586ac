"""What the micro-batches of a stretch of a run add up to, and who holds the stream up."""

from collections.abc import Callable
from dataclasses import dataclass, field

from raydistil.trace import Record
from raydistil.types import Verdict

RECENT = 4  # turns of all lanes: one that has had none of them is gone
WAITS = 0.05  # of the student's time spent waiting: above it the teachers are too slow
BUSY = 0.8  # of the teachers' time at work: below it the student is too slow


@dataclass(frozen=True, slots=True)
class Lane:
    """One thread of a teacher's, as far as it was seen."""

    started_s: float  # its first micro-batch
    ended_s: float  # its last one
    turn: int  # which micro-batch of the student's that was


@dataclass(slots=True)
class Tally:
    """Sums over micro-batches of one student worker; seconds, and real tokens.

    All `workers` get as many, so that what is the teachers' counts that many times.
    """

    workers: int = 1
    micro_batches: int = 0
    tokens: int = 0
    num_bytes: int = 0
    wait_s: float = 0.0  # the student waited for targets
    first_wait_s: float = 0.0  # for the first ones: the teachers were loading
    student_busy_s: float = 0.0
    teacher_busy_s: float = 0.0  # of all lanes
    teacher_tokens: float = 0.0  # by all of an ensemble: each its share
    queued_s: float = 0.0  # from the last teacher's end to the student's start
    lanes: dict[str, Lane] = field(default_factory=dict)
    teachers: set[str] = field(default_factory=set)
    now_s: float = 0.0  # the end of the last micro-batch

    def add(self, record: Record) -> None:
        if not self.micro_batches:
            self.first_wait_s = record.started_s - record.asked_s
        self.micro_batches += 1
        self.tokens += record.tokens
        self.num_bytes += record.num_bytes
        self.wait_s += record.started_s - record.asked_s
        self.student_busy_s += record.ended_s - record.started_s
        self.now_s = record.ended_s
        for timing in record.taught:
            began_s = self.lanes[timing.lane].started_s if timing.lane in self.lanes else timing.started_s
            self.lanes[timing.lane] = Lane(began_s, timing.ended_s, self.micro_batches)
            self.teachers.add(timing.teacher)
            self.teacher_busy_s += timing.ended_s - timing.started_s
            self.teacher_tokens += timing.tokens / len(record.taught)
        if record.taught:
            self.queued_s += record.started_s - max(timing.ended_s for timing in record.taught)

    @property
    def teacher_tok_s(self) -> float:
        """Tokens a second that the teachers make while they work, all that are there together; 0 without any."""
        there = sum(map(self._is_there, self.lanes.values()))
        return self.teacher_tokens / self.teacher_busy_s * there if self.teacher_busy_s else 0.0

    def _is_there(self, lane: Lane) -> bool:
        return self.micro_batches - lane.turn <= RECENT * len(self.lanes)

    def _lanes_s(self, seconds: float) -> float:
        """What all lanes had of the last `seconds`: some came late, others died."""
        ends = ((lane, self.now_s if self._is_there(lane) else lane.ended_s) for lane in self.lanes.values())
        return sum(min(seconds, end - lane.started_s) for lane, end in ends)

    def queue_depth(self, seconds: float) -> float:
        """Micro-batches that lay ready on average (Little's law: their time in the queue, over the time there was)."""
        return self.workers * self.queued_s / seconds

    def verdict(self, seconds: float, shared: bool) -> Verdict | None:
        """Of the `seconds` since the first targets were there; None without teachers.

        `shared`: teachers and students have the same cores. Where a student waits, its cores are at the teachers' work.
        """
        if not self.lanes:
            return None
        if not shared and self.wait_s - self.first_wait_s > WAITS * seconds:
            return "teacher-bound"
        idle = self.workers * self.teacher_busy_s < BUSY * self._lanes_s(seconds)
        return "student-bound" if idle else "balanced"


class Used:
    """How much of what the machine could do goes into the model: its FLOPs utilisation, MFU (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B), the share of a rate of large matrix products."""

    def __init__(self, flops_per_token: float, rate: Callable[[], float]) -> None:
        """`rate`: measures FLOPs a second."""
        self._flops_per_token, self._rate = flops_per_token, rate
        self._peak: float | None = None

    def measure(self) -> None:
        """Do so, unless it is known."""
        self._peak = self._peak or self._rate()

    def share(self, tokens: int, seconds: float) -> float:
        """Of so many real tokens; 0 where nothing was measured yet."""
        return self._flops_per_token * tokens / (self._peak * seconds) if self._peak and seconds else 0.0


def advice(verdict: Verdict, shared: bool) -> str:
    """The knob to turn."""
    if shared:
        return "teachers and students have the same cores in turn: more cores, or a machine for each, would speed it up"
    return {
        "teacher-bound": "more cluster.teachers (or teacher_threads), or teacher.precision auto, would speed it up",
        "student-bound": "more cluster.students or student_threads would speed it up; the teachers have time to spare",
        "balanced": "teachers and students are matched",
    }[verdict]
