"""What is served: the student, on how many replicas, and what answers beside it."""

from dataclasses import dataclass, replace
from typing import Literal

from raydistil.serve.canary import Limits
from raydistil.serve.schema import Source, Wish

Name = Literal["teacher", "canary"]


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a replica has."""

    threads: int = 1
    on_gpu: bool = False


ONE = Hardware()


@dataclass(frozen=True, slots=True)
class Replicas:
    least: int = 1
    most: int = 2
    calm_s: float = 60.0  # as long must fewer be enough
    cpus: int = 1  # of Ray, of each: the threads of its model
    gpus: float = 0.0  # of Ray, of each: a fraction where several share one


@dataclass(frozen=True, slots=True)
class Cascade:
    """Texts whose calibrated confidence is below `threshold` are the teacher's."""

    threshold: float
    temperature: float  # what the student's logits are divided by (Guo et al. 2017, arXiv:1706.04599)
    share: float  # of the validation rows that are the teacher's then
    accuracy: float  # on these rows
    wanted: float  # accuracy, at least


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asked for, by where it is."""

    run_dir: str
    replicas: Replicas = Replicas()
    backend: Wish = "auto"
    keys: str | None = None
    teacher: str | None = None  # None: the run's own, where one is needed
    shadow: float = 0.0  # share of the requests
    cascade: Cascade | None = None
    canary: str | None = None
    canary_share: float = 0.1
    limits: Limits = Limits()  # noqa: RUF009  frozen; of the canary


@dataclass(frozen=True, slots=True)
class Canary:
    source: Source
    share: float  # of the requests
    limits: Limits


@dataclass(frozen=True, slots=True)
class Beside:
    teacher: Source | None = None
    shadow: float = 0.0
    cascade: Cascade | None = None
    canary: Canary | None = None

    def sources(self) -> dict[Name, Source]:
        canary = self.canary.source if self.canary else None
        named: dict[Name, Source | None] = {"teacher": self.teacher, "canary": canary}
        return {name: source for name, source in named.items() if source is not None}


@dataclass(frozen=True, slots=True)
class Served:
    source: Source
    replicas: Replicas
    beside: Beside

    def without_canary(self) -> "Served":
        return replace(self, beside=replace(self.beside, canary=None))
