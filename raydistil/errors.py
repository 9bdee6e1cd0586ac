"""Every error a user can cause or meet, as one small tree.

    RaydistilError            exit code 2, one line: what was expected, what came, what to do
    ├── ConfigError           a key, a value or a combination of values in the configuration
    ├── DataError             a file, a row, a label, an encoding
    ├── ModelError            a checkpoint, a vocabulary, a layer choice
    ├── ExportError           a format that a student cannot have, or loses too much in
    ├── PlanError             the run asks for more than the cluster has
    ├── StorageError          a directory of another run, one that cannot be written to
    │   └── FullError         exit code 1: no space left
    ├── DivergedError         exit code 1: a loss that is no number any more
    └── FailedError           exit code 1: processes that die again and again

    Interrupted               exit code 130: stopped by the user, after a checkpoint

Anything else that escapes is a defect or a failure of the machine: exit code 1 with a traceback.
"""


class RaydistilError(Exception):
    """A condition the user can act on; its text is the single line that is shown."""

    exit_code = 2

    def __init__(self, text: str) -> None:
        super().__init__(" ".join(line.strip() for line in text.splitlines()))


class ConfigError(RaydistilError):
    """The configuration is wrong."""


class DataError(RaydistilError):
    """The corpus is wrong; the text names the file and row."""


class ModelError(RaydistilError):
    """The teacher, the student or the two together are wrong."""


class ExportError(RaydistilError):
    """A student cannot be had in a format; the text says what to do instead."""


class PlanError(RaydistilError):
    """The cluster cannot hold the run; the text holds the arithmetic."""


class StorageError(RaydistilError):
    """A directory cannot be read or written as the run needs it."""


class FullError(StorageError):
    """No space is left; what was whole before is so still."""

    exit_code = 1


class DivergedError(RaydistilError):
    """A training has lost its way; the text names the step."""

    exit_code = 1


class FailedError(RaydistilError):
    """A training that cannot go on; the text says what became of its processes."""

    exit_code = 1


class Interrupted(Exception):
    """The user stopped the run; the text says where it can go on from."""


def unwrapped(error: BaseException) -> BaseException:
    """The user's error inside what Ray wraps around the failures of other processes, else `error` itself."""
    seen: list[BaseException] = [error]
    for current in seen:
        cause = getattr(current, "cause", None)
        if isinstance(current, RaydistilError) and cause is None:
            return current
        controller = getattr(current, "controller_failure", None)
        inner = [current.__cause__, cause, controller, *getattr(current, "worker_failures", {}).values()]
        seen += [e for e in inner if isinstance(e, BaseException) and e not in seen]
    return error
