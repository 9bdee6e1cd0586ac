"""Checkpoints where they lie: complete ones and no others, found, proved whole and removed.

One is a directory: DeepSpeed shards of all workers, the plain Hugging Face model, and last of all `state.json`, which
says what it stands on and what every file's bytes come to. Without that file it is not there. A micro-batch is consumed
when the optimizer step that used it is in the checkpoint; the stream of a resumed run is the manifest less the ledger.
No state of a random number generator is among it: what is drawn is a function of (seed, position).
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from raydistil.errors import StorageError
from raydistil.manifest import Ledger
from raydistil.storage import scratch_directory
from raydistil.types import TrainSummary

TAG = "deepspeed"
MODEL = "model"
STATE = "state.json"
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class State:
    """What a checkpoint says of itself."""

    ledger: Ledger
    per_step: int  # micro-batches of an optimizer step
    workers: int  # that it was written by
    mean_loss: float  # since the one before
    run_hash: str  # see `rundir.run_hash`
    config: dict[str, Any]  # as it was resolved
    summary: TrainSummary
    files: dict[str, str]  # SHA-256 by relative path

    @property
    def steps(self) -> int:
        """Optimizer steps that are done."""
        return self.ledger.done(self.per_step)


@dataclass(frozen=True, slots=True)
class Kept:
    """A complete checkpoint."""

    name: str
    state: State


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """The checkpoints of one training. `place`: a directory, or an s3:// or gs:// address with what it may need
    (`s3://bucket/folder?endpoint_override=...`). `below`: the path from there, of the run and the stage."""

    place: str
    below: str

    def open(self) -> tuple[fs.FileSystem, str]:
        """The file system, and the directory there."""
        if "://" not in self.place:
            return fs.LocalFileSystem(), str(Path(self.place, self.below).resolve())
        try:
            filesystem, path = fs.FileSystem.from_uri(self.place)
        except (OSError, ValueError) as error:
            raise StorageError(f"expected checkpoints.storage to be a place to write to, got {error}") from error
        return filesystem, f"{path}/{self.below}"

    @property
    def local(self) -> Path | None:
        """The directory, where it is one."""
        filesystem, path = self.open()
        return Path(path) if isinstance(filesystem, fs.LocalFileSystem) else None

    def complete(self) -> list[Kept]:
        """All of them whose state can be read, by their steps."""
        found = [Kept(name, state) for name in self._names() if (state := self._readable(name)) is not None]
        return sorted(found, key=lambda one: (one.state.steps, one.name))

    def _names(self) -> list[str]:
        """Of those that have a state."""
        filesystem, root = self.open()
        found = filesystem.get_file_info([f"{entry.path}/{STATE}" for entry in _entries(filesystem, root)])
        return [Path(info.path).parent.name for info in found if info.is_file]

    def _readable(self, name: str) -> State | None:
        """None for one that is just being removed, or whose state a crash of the machine has cut off.

        Raises OSError for a place that does not answer: what is there may well be whole.
        """
        try:
            return self.state(name)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def state(self, name: str) -> State:
        """Of a complete one."""
        fields = json.loads(self.read(f"{name}/{STATE}") or "")
        ledger = Ledger(tuple((start, end) for start, end in fields.pop("ledger")["ranges"]))
        return State(ledger, summary=TrainSummary(**fields.pop("summary")), **fields)

    def newest(self) -> Kept | None:
        """None where there is none."""
        return next(reversed(self.complete()), None)

    def newest_whole(self, run_hash: str, say: Callable[[str], object], below: str = "") -> Kept | None:
        """The newest one whose files (`below`: those in a directory of it) are what they were when it was made. Damaged
        ones are named, and removed: they would be kept in the place of whole ones.

        Raises StorageError where there are some, but no whole one, or where they are another run's; OSError for a place
        that does not answer.
        """
        kept, named = self.complete(), list[str]()
        for name in set(self._names()) - {one.name for one in kept}:
            say(f"checkpoint {name} is damaged ({STATE} cannot be read): going on without it")
        for one in reversed(kept):
            if one.state.run_hash != run_hash:
                raise StorageError(
                    f"expected checkpoints of this run in {self.place}/{self.below}, got those of another one, or of "
                    f"another content of its corpus or teacher: choose another checkpoints.storage or name, or remove "
                    f"them"
                )
            damaged = self._damaged(one, below)
            if damaged is None:
                for name in named:
                    self.remove(name)
                return one
            named.append(one.name)
            say(f"checkpoint {one.name} is damaged ({damaged}): going on from the one before")
        if kept:
            raise StorageError(
                f"expected a whole checkpoint in {self.place}/{self.below}, got damaged ones only, "
                f"{', '.join(one.name for one in kept)}: remove them to start anew"
            )
        return None

    def _damaged(self, kept: Kept, below: str) -> str | None:
        """What is wrong with its files; None: nothing."""
        filesystem, root = self.open()
        for relative, digest in kept.state.files.items():
            if not relative.startswith(below):
                continue
            try:
                with filesystem.open_input_stream(f"{root}/{kept.name}/{relative}") as file:
                    if digest_of(file) != digest:
                        return f"{relative} is not what was written"
            except OSError as error:
                if not isinstance(error, FileNotFoundError) and error.errno != errno.EIO:
                    raise  # the place, and not the file
                return f"{relative}: {error}"
        return None

    def commit(self, name: str, state: State) -> None:
        """The last file of a checkpoint, there as a whole or not at all: with it the checkpoint is."""
        self.write(f"{name}/{STATE}", json.dumps(asdict(state), default=str).encode())

    def write(self, relative: str, content: bytes) -> None:
        """A small file, as a whole or not at all."""
        filesystem, root = self.open()
        filesystem.create_dir(str(Path(root, relative).parent))
        with filesystem.open_output_stream(f"{root}/{relative}.part") as file:
            file.write(content)
        if isinstance(filesystem, fs.LocalFileSystem):
            _to_disk(Path(root, f"{relative}.part"))
        filesystem.move(f"{root}/{relative}.part", f"{root}/{relative}")

    def read(self, relative: str) -> bytes | None:
        """None where it is not there."""
        filesystem, root = self.open()
        if not filesystem.get_file_info(f"{root}/{relative}").is_file:
            return None
        with filesystem.open_input_stream(f"{root}/{relative}") as file:
            content: bytes = file.read()
        return content

    @contextmanager
    def at_hand(self, relative: str) -> Iterator[Path]:
        """A directory below, as a local one until the block ends."""
        filesystem, root = self.open()
        if self.local is not None:
            yield Path(root, relative)
            return
        with scratch_directory() as scratch:
            fs.copy_files(f"{root}/{relative}", str(scratch), source_filesystem=filesystem)
            yield scratch

    def keep(self, last: int, best: int) -> None:
        """Remove the others, of the complete ones."""
        kept = self.complete()
        by_loss = sorted(kept, key=lambda one: one.state.mean_loss)
        stay = {one.name for one in (*kept[-last:], *by_loss[:best])}
        for one in kept:
            if one.name not in stay:
                self.remove(one.name)

    def sweep(self) -> None:
        """Remove what never was complete: nobody may be writing."""
        filesystem, root = self.open()
        complete = set(self._names())
        for entry in _entries(filesystem, root):
            if entry.base_name not in complete:
                filesystem.delete_dir(entry.path)

    def remove(self, name: str) -> None:
        """First of all from the complete ones, so that it never is one with something missing."""
        filesystem, root = self.open()
        if filesystem.get_file_info(f"{root}/{name}/{STATE}").is_file:
            filesystem.delete_file(f"{root}/{name}/{STATE}")
        if filesystem.get_file_info(f"{root}/{name}").type == fs.FileType.Directory:
            filesystem.delete_dir(f"{root}/{name}")

    def remove_all(self) -> None:
        filesystem, root = self.open()
        for entry in _entries(filesystem, root):
            self.remove(entry.base_name)
        if self.local is not None and self.local.exists():
            filesystem.delete_dir(root)


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _entries(filesystem: fs.FileSystem, root: str) -> list[fs.FileInfo]:
    """The directories in `root`."""
    found = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
    return [entry for entry in found if entry.type == fs.FileType.Directory]


def digest_of(file: Any) -> str:
    """SHA-256 of what is left of an open file, in hexadecimal."""
    found = hashlib.sha256()
    while chunk := file.read(CHUNK):
        found.update(chunk)
    return found.hexdigest()
