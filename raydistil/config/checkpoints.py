"""The section of the checkpoints."""

from typing import Annotated

from pydantic import Field

from raydistil.config.section import Positive, Section


class CheckpointsConfig(Section):
    """When a training is saved, and where to: not part of what defines a run."""

    every_min: Annotated[float, Field(gt=0)] = 10.0
    """Minutes from one to the next."""
    every_steps: Positive | None = None
    """Optimizer steps from one to the next, where that is sooner."""
    keep_last: Positive = 2
    """The newest ones, which stay: the one before is gone on from where the last one is damaged."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Those of the lowest mean loss since the one before, which stay beside them."""
    keep_at_end: bool = False
    """Leave them when the training is done; its model stands in the run's directory either way."""
    storage: str | None = None
    """A directory, or an s3:// or gs:// address, that every worker can write to; None: the run's directory."""
