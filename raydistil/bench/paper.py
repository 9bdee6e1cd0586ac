"""Part (b) of bench scale: a cluster on paper, as a closed network of queues.

A micro-batch goes from the scheduler to a teacher, over the object store and the network to a student, and its place is
then taken by the next one: a fixed number of them is on the way, which is what bounds the store. Throughput is that of
exact mean value analysis (Reiser and Lavenberg 1980), with a station of c servers as a queue of 1/c of the time and a
delay of the rest (Seidmann et al. 1987). The station whose capacity is least binds.
"""

from dataclasses import dataclass

BYTES_PER_GRADIENT = 4
COPIES = 3  # of a target's bytes in object stores: written at the teacher's, written and read at the student's node
REMOTE = 1.0  # share of the targets that go to another node: no placement is assumed


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one micro-batch at each part. Seconds, bytes, tokens."""

    tokens: int
    teacher_s: float  # on one GPU
    student_s: float  # on one GPU, forward and backward
    scheduler_s: float  # of the one process that schedules
    num_bytes: int  # over the wire
    parameters: int  # of the student, whose gradients are summed over the students in every step


@dataclass(frozen=True, slots=True)
class Machines:
    """What a cluster is made of."""

    gpus_per_node: int
    network_bytes_s: float  # of a node, each way
    store_bytes_s: float  # that one process writes to its node's object store, or reads from it
    gpu_hour: float  # its price


@dataclass(frozen=True, slots=True)
class Outlook:
    """A cluster of so many GPUs."""

    gpus: int
    teachers: int
    students: int
    tok_s: float
    binds: str
    scheduler_share: float  # of its capacity that is used; so of the others
    store_share: float
    network_share: float
    student_share: float
    cost_per_billion_tokens: float


@dataclass(frozen=True, slots=True)
class Station:
    """`seconds` of work a micro-batch, `servers` that do it side by side."""

    name: str
    seconds: float
    servers: int

    @property
    def capacity(self) -> float:
        """Micro-batches a second."""
        return self.servers / self.seconds


def outlook(gpus: int, costs: Costs, machines: Machines, ahead: int) -> Outlook:
    """`ahead`: micro-batches on the way for every student, see `max_bytes_in_flight`. The GPUs are shared out so that
    teachers keep up with students, at least one of each."""
    students = min(gpus - 1, max(1, int(gpus * costs.student_s / (costs.student_s + costs.teacher_s))))
    stations = _stations(gpus, gpus - students, students, costs, machines)
    per_s = throughput(stations, ahead * students)
    used = {station.name: per_s / station.capacity for station in stations}
    return Outlook(
        gpus, gpus - students, students, per_s * costs.tokens, max(used, key=lambda name: used[name]),
        used["scheduler"], used["object store"], used["network"], used["student"],
        gpus * machines.gpu_hour / 3600 / (per_s * costs.tokens) * 1e9,
    )  # fmt: skip


def _stations(gpus: int, teachers: int, students: int, costs: Costs, machines: Machines) -> tuple[Station, ...]:
    nodes = -(-gpus // machines.gpus_per_node)
    summed = 2 * (students - 1) / students * costs.parameters * BYTES_PER_GRADIENT / machines.network_bytes_s
    return (
        Station("scheduler", costs.scheduler_s, 1),
        Station("teacher", costs.teacher_s, teachers),
        Station("object store", COPIES * costs.num_bytes / machines.store_bytes_s, gpus),  # each has its process
        Station("network", REMOTE * costs.num_bytes / machines.network_bytes_s, nodes),
        Station("student", costs.student_s + summed, students),
    )


def throughput(stations: tuple[Station, ...], on_the_way: int) -> float:
    """Micro-batches a second with so many of them on the way."""
    delay = sum(station.seconds * (1 - 1 / station.servers) for station in stations)
    queues, per_s = [0.0] * len(stations), 0.0
    for jobs in range(1, on_the_way + 1):
        stays = [s.seconds / s.servers * (1 + queue) for s, queue in zip(stations, queues, strict=True)]
        per_s = jobs / (delay + sum(stays))
        queues = [per_s * stay for stay in stays]
    return per_s
