"""What a student worker does beside its training."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from raydistil.worker import bound_waiting


def waits(group: Any) -> timedelta:
    found: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return found


def test_nobody_waits_for_half_an_hour_for_a_worker_that_hangs(tmp_path: Path) -> None:
    """In groups that somebody made for themselves, as DeepSpeed does."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=77))
    try:
        groups = [distributed.group.WORLD, distributed.new_group([0])]
        assert waits(groups[1]) == timedelta(minutes=30)
        bound_waiting(8.0)
        assert [waits(group) for group in groups] == [timedelta(seconds=8)] * 2
    finally:
        distributed.destroy_process_group()
