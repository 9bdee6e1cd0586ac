"""What the user asked for, found on disk and known to go together."""

from dataclasses import replace
from pathlib import Path

from raydistil import rundir
from raydistil.errors import PlanError, StorageError
from raydistil.serve.keys import read_keys
from raydistil.serve.schema import Source
from raydistil.serve.served import Beside, Canary, Served, Wishes
from raydistil.serve.source import find, labels_of, width_of
from raydistil.types import has_classes


def offered(wishes: Wishes) -> Served:
    """Raises StorageError for a model that is missing or broken; PlanError for one that cannot stand in for another."""
    known = () if wishes.keys is None else tuple((key.name, key.hash, key.rate) for key in read_keys(Path(wishes.keys)))
    student = replace(find(Path(wishes.run_dir)), backend=wishes.backend, keys=known)
    if wishes.cascade and student.task != "classification":
        raise PlanError(f"expected a student of classification for a cascade, {wishes.run_dir} is of {student.task}")
    teacher = canary = None
    if student.task == "regression" and (wishes.shadow or wishes.canary is not None):
        raise PlanError(
            f"expected a student whose answers agree with another's or do not, {wishes.run_dir} gives numbers: leave "
            f"shadow and canary out"
        )
    if wishes.shadow or wishes.cascade:
        path = teacher_of(Path(wishes.run_dir)) if wishes.teacher is None else Path(wishes.teacher)
        teacher = _companion(student, path, "teacher")
    if wishes.canary is not None:
        found = replace(_companion(student, Path(wishes.canary), "canary"), backend=wishes.backend)
        canary = Canary(found, wishes.canary_share, wishes.limits)
    return Served(student, wishes.replicas, Beside(teacher, wishes.shadow, wishes.cascade, canary))


def teacher_of(run_dir: Path) -> Path:
    """Where the teacher of a run is: fine-tuned by it, or as it was. Raises StorageError where there is no run."""
    if (run_dir / rundir.TEACHER).is_dir():
        return run_dir / rundir.TEACHER
    config = rundir.read_config(run_dir)
    if config is None:
        raise StorageError(
            f"expected the directory of a run, which names its teacher, got {run_dir}: say where it is with --teacher"
        )
    from raydistil.models import resolve

    return Path(resolve(config["teacher"]["model"], "teacher.model"))


def _companion(student: Source, path: Path, what: str) -> Source:
    """Raises PlanError where its answers cannot be compared with the student's."""
    found = find(path)
    if found.task != student.task:
        raise PlanError(f"expected a {what} for {student.task} like the student, {path} is one for {found.task}")
    theirs, ours = (sorted(labels_of(Path(each.directory))) for each in (found, student))
    if has_classes(student.task) and theirs != ours:
        raise PlanError(f"expected a {what} with the student's labels {ours}, {path} has {theirs}")
    wide, own = (width_of(Path(each.directory)) for each in (found, student))
    if student.task == "embedding" and wide != own:
        raise PlanError(f"expected a {what} with vectors of {own} numbers like the student's, {path} gives {wide}")
    return found
