"""The section of the cluster."""

from typing import Annotated

from pydantic import AfterValidator, Field

from raydistil.config.section import Positive, Section

Labels = Annotated[str, Field(pattern=r"^!?([\w.-]+|in\([\w.-]+(, ?[\w.-]+)*\))$")]  # as Ray's selectors have them


def _ascending(ends: tuple[int, int]) -> tuple[int, int]:
    if ends[0] > ends[1]:
        raise ValueError("expected the fewest, then the most")
    return ends


FewestMost = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]


class ClusterConfig(Section):
    """Placement: not part of what defines a run. More students make a larger batch, where it is begun."""

    address: str | None = None
    """Ray address; None: RAY_ADDRESS if set, else a local cluster for this run."""
    object_store_bytes: Annotated[int, Field(ge=128 << 20)] = 2 << 30
    """Of the local cluster."""
    students: Positive | FewestMost = 1
    """Student workers; or fewest and most of them: as many as there is room for, who make up the batch of the most.
    Looked at again every minute, and when one is lost."""
    student_cpus: Annotated[float, Field(gt=0)] = 1
    student_gpus: Annotated[float, Field(ge=0)] = 0
    student_threads: Positive | None = None
    """Threads of torch. None: on a machine of our own every core, with teachers behind, who take what is left; on a
    cluster that is joined, the cores, shared out between teachers and students."""
    teachers: FewestMost = (1, 1)
    """Fewest and most teacher actors."""
    teacher_cpus: Annotated[float, Field(gt=0)] = 1
    teacher_gpus: Annotated[float, Field(ge=0)] = 0
    teacher_threads: Positive | None = None
    """Of each teacher; None: as above."""
    student_label_selector: dict[str, Labels] = Field(default_factory=dict)
    """Labels of the nodes the students may run on, as Ray has them: `{"ray.io/accelerator-type" = "H100"}`; a value may
    be `!v`, `in(v, w)` or `!in(v, w)`. Empty: any node."""
    teacher_label_selector: dict[str, Labels] = Field(default_factory=dict)
    """Of the nodes the teachers may run on."""
    max_bytes_in_flight: Annotated[int, Field(ge=1 << 20)] = 256 << 20
    """Most bytes of targets that wait in the object store however fast the teacher is."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Times in a row that a student worker, or what feeds it, may die between two checkpoints; the workers start again
    from the last one. Teachers that die are replaced without a stop."""
    hang_timeout_s: Annotated[float, Field(ge=5)] = 600
    """Seconds after which a student worker that does not answer, or waits for another one, is taken for dead."""
    trace: bool = False
    """Write down what every micro-batch was and when it was taught and trained on: STAGE-trace-RANK.jsonl in the run's
    directory, which every worker must then be able to write to."""

    @property
    def fewest_students(self) -> int:
        return self.students if isinstance(self.students, int) else self.students[0]

    @property
    def most_students(self) -> int:
        return self.students if isinstance(self.students, int) else self.students[1]
