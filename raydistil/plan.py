"""What a run needs of the cluster, checked before it starts: Ray waits in silence for what will never come."""

import os
from dataclasses import dataclass, field

from raydistil.config.cluster import ClusterConfig
from raydistil.errors import PlanError

READ_CPUS = 0.25  # a task that reads and masks tokens


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the cluster: its logical resources and its labels."""

    cpus: float
    gpus: float
    labels: dict[str, str]


@dataclass(frozen=True, slots=True)
class Need:
    """Logical resources of one training run, at its smallest."""

    students: int
    student_cpus: float
    student_gpus: float
    teachers: int
    teacher_cpus: float
    teacher_gpus: float
    student_on: dict[str, str] = field(default_factory=dict)  # labels of the nodes they may run on
    teacher_on: dict[str, str] = field(default_factory=dict)

    @property
    def cpus(self) -> float:
        return self.students * self.student_cpus + self.teachers * self.teacher_cpus + READ_CPUS

    @property
    def gpus(self) -> float:
        return self.students * self.student_gpus + self.teachers * self.teacher_gpus

    def arithmetic(self) -> str:
        """How `cpus` and `gpus` come about."""
        cpus = f"{self.students} students x {self.student_cpus:g} + {self.teachers} teachers x {self.teacher_cpus:g}"
        gpus = f"{self.students} x {self.student_gpus:g} + {self.teachers} x {self.teacher_gpus:g}"
        return f"CPUs: {cpus} + {READ_CPUS:g} to read = {self.cpus:g}; GPUs: {gpus} = {self.gpus:g}"


def need_of(cluster: ClusterConfig, pools: int, with_student: bool = True) -> Need:
    """What `cluster` asks for, with as few teachers in each of the pools as it allows."""
    return Need(
        cluster.fewest_students if with_student else 0, cluster.student_cpus, cluster.student_gpus,
        pools * cluster.teachers[0], cluster.teacher_cpus, cluster.teacher_gpus,
        cluster.student_label_selector, cluster.teacher_label_selector,
    )  # fmt: skip


def check_fits(need: Need, cpus: float, gpus: float, largest_cpus: float) -> None:
    """Raise PlanError, with the arithmetic, where the cluster's totals or its largest node are too small."""
    if need.cpus > cpus or need.gpus > gpus:
        raise PlanError(
            f"expected a cluster that holds the run ({need.arithmetic()}), found {cpus:g} CPUs and {gpus:g} GPUs: "
            f"lower cluster.students, cluster.teachers or their cpus and gpus, or add nodes"
        )
    widest = max(need.student_cpus if need.students else 0, need.teacher_cpus if need.teachers else 0)
    if widest > largest_cpus:
        raise PlanError(
            f"expected a node with {widest:g} CPUs for one worker, the largest has {largest_cpus:g}: "
            f"lower cluster.student_cpus or cluster.teacher_cpus"
        )


def check_placed(need: Need, nodes: list[Node]) -> None:
    """Raise PlanError where the nodes with the labels that students or teachers ask for cannot hold them."""
    roles = (
        ("student", need.student_on, need.students, need.student_cpus, need.student_gpus),
        ("teacher", need.teacher_on, need.teachers, need.teacher_cpus, need.teacher_gpus),
    )
    for role, selector, count, cpus, gpus in roles:
        fit = [node for node in nodes if matches(selector, node.labels)]
        found_cpus, found_gpus = sum(node.cpus for node in fit), sum(node.gpus for node in fit)
        if count * cpus > found_cpus or count * gpus > found_gpus:
            raise PlanError(
                f"expected {count * cpus:g} CPUs and {count * gpus:g} GPUs for {count} {role}s on nodes with labels "
                f"{_shown(selector)}, found {found_cpus:g} and {found_gpus:g} on {len(fit)} of {len(nodes)} nodes: "
                f"change cluster.{role}_label_selector, or start nodes with --labels"
            )


def _shown(selector: dict[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in selector.items()) or "(any)"


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Whether a node's labels are what Ray's label selector asks for: `v`, `!v`, `in(v, w)`, `!in(v, w)`."""
    for key, value in selector.items():
        positive = value.removeprefix("!")
        listed = positive.removeprefix("in(").removesuffix(")") if positive.startswith("in(") else positive
        among = labels.get(key) in [part.strip() for part in listed.split(",")]
        if among == value.startswith("!"):
            return False
    return True


def local_cpus() -> int:
    """Logical CPUs of a local cluster, bookkeeping for Ray: twice the cores, so that a small machine holds it all."""
    return max(8, 2 * cores())


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Threads:
    """Of torch, in a student and in a teacher."""

    student: int
    teacher: int
    shared: bool  # whether both are after the same cores, where the teachers get what the students leave


def threads(cluster: ClusterConfig, pools: int, cached: bool = False, joined: bool = False) -> Threads:
    """As configured, else by the cores there are.

    On a machine of our own students may use all cores, and so may the teachers, behind them: with a half each, the
    faster one's would be idle in part. `joined`: the cluster is another's, and its nodes have other work and perhaps
    other cores: those here are shared out evenly, as are those that start a GPU's work. `cached`: the teachers are
    through before the students start, one pool after the other, and a core is left to what reads their targets:
    threads that wait for one that cannot run are slower than fewer of them.
    """
    students, teachers = cluster.most_students, cluster.teachers[0] * pools
    apart = joined or cached or not teachers or cluster.teacher_gpus + cluster.student_gpus > 0
    even = cores() // (students + teachers)
    student, teacher = (even, even) if apart else (cores() // students, cores() // teachers)
    if cached:
        student, teacher = (cores() - 1) // students, cores() // cluster.teachers[0]
    chosen = cluster.student_threads or max(1, student), cluster.teacher_threads or max(1, teacher)
    return Threads(*chosen, not apart and students * chosen[0] + teachers * chosen[1] > cores())
