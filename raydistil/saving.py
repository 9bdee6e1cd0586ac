"""A student worker saves: the state of its engine at once, everything after that behind the next steps.

What holds the training up is writing to the page cache (or, for a store that is no directory, to a scratch directory).
Digests, the way to the disk or the network, the commit and the removal of old ones happen in a thread of their own.
Directories have names that no other start of the workers uses: what a worker that should be dead still writes harms
nobody.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyarrow import fs

from raydistil.checkpoint import MODEL, TAG, CheckpointStore, State, digest_of
from raydistil.config.checkpoints import CheckpointsConfig
from raydistil.errors import FullError, StorageError
from raydistil.partitioned import gathered
from raydistil.storage import is_disk_full, scratch_directory
from raydistil.student import save_model

OTHERS_S = 600.0  # that rank 0 waits for what the others have to bring
LOOK_S = 0.1


class Saver:
    """Of one worker. `start`: a name that all workers of this start have, and nobody else."""

    def __init__(self, store: CheckpointStore, config: CheckpointsConfig, rank: int, world: int, start: str) -> None:
        self._store, self._config, self._start = store, config, start
        self._rank, self._world = rank, world
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: Future[None] | None = None
        self.count, self.held_s = 0, 0.0  # checkpoints; seconds that training stood still for them

    def save(self, engine: Any, tokenizer: str, state: State) -> None:
        """Every worker must call this at the same step. Returns when training may go on; `wait` says how it went."""
        self.wait()
        with self._holding():
            self._begin(f"step-{engine.global_steps:09d}-{self._start}", engine, tokenizer, state)

    def _begin(self, name: str, engine: Any, tokenizer: str, state: State) -> None:
        with ExitStack() as making:
            making.enter_context(self._cleaning(name))
            scratch = making.enter_context(self._scratch(name))
            engine.save_checkpoint(str(scratch), tag=TAG)
            with gathered(engine.module.model):
                if self._rank == 0:
                    save_model(engine.module.model, tokenizer, scratch / MODEL)
            self._pending = self._thread.submit(self._finish, making.pop_all(), name, scratch, state)
        self.count += 1

    def look(self) -> None:
        """Raise what the thread met, if it has."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until what was saved is a checkpoint (on rank 0; on others, until it has all of theirs).

        Raises FullError where the disk is full.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._holding():
                pending.result()

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Training stands still."""
        began = time.monotonic()
        yield
        self.held_s += time.monotonic() - began

    @contextmanager
    def _cleaning(self, name: str) -> Iterator[None]:
        """Nothing stays behind of what fails. Raises FullError for a full disk."""
        try:
            yield
        except Exception as error:
            self._store.remove(name)
            if is_disk_full(error):
                raise FullError(
                    f"no space left for a checkpoint in {self._store.place}; the last one is as it was: free some, and "
                    f"run again"
                ) from error
            raise

    @contextmanager
    def _scratch(self, name: str) -> Iterator[Path]:
        """A directory of this worker's, on the store's own file system if it has one."""
        local = self._store.local
        if local is None:
            with scratch_directory() as path:
                yield path
            return
        path = local / f"{name}.rank-{self._rank}"
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _finish(self, making: ExitStack, name: str, scratch: Path, state: State) -> None:
        with making:
            files = dict(_digests(scratch))
            self._publish(name, scratch, list(files))
            self._store.write(f"{name}/files-{self._rank}.json", json.dumps(files).encode())
            if self._rank == 0:
                self._store.commit(name, replace(state, files=self._everyones(name)))
        if self._rank == 0:
            with suppress(OSError):  # what stays too long harms nobody: it goes with the next one
                self._store.keep(self._config.keep_last, self._config.keep_best)

    def _publish(self, name: str, scratch: Path, files: list[str]) -> None:
        filesystem, root = self._store.open()
        if not isinstance(filesystem, fs.LocalFileSystem):
            fs.copy_files(str(scratch), f"{root}/{name}", destination_filesystem=filesystem)
            return
        for relative in files:
            target = Path(root, name, relative)
            target.parent.mkdir(parents=True, exist_ok=True)
            (scratch / relative).rename(target)

    def _everyones(self, name: str) -> dict[str, str]:
        """The digests of all workers' files, when the last of them is there."""
        deadline, files = time.monotonic() + OTHERS_S, dict[str, str]()
        for rank in range(self._world):
            while (written := self._store.read(f"{name}/files-{rank}.json")) is None:
                if time.monotonic() > deadline:
                    raise StorageError(
                        f"expected a place that all {self._world} student workers write to, got nothing from worker "
                        f"{rank} in {self._store.place} within {OTHERS_S:.0f} s: set checkpoints.storage to one"
                    )
                time.sleep(LOOK_S)
            files |= json.loads(written)
        return files


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    """(relative path, SHA-256) of every file; each is on the disk then."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                yield path.relative_to(folder).as_posix(), digest_of(file)
