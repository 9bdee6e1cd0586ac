"""Directories that appear whole or not at all, also on a full disk."""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from disks import small_disk
from safetensors.torch import save_file

from raydistil.errors import StorageError
from raydistil.storage import LEFT, cache_dir, is_disk_full, remove_leftovers, scratch_directory, whole_directory

SIZE = 4 << 20  # bytes: more than the small disk holds


def files(folder: Path) -> dict[str, str]:
    """Every file below `folder`, hidden ones too, with its content."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def full_soon(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    with small_disk(tmp_path / "disk", 1 << 20) as path:
        yield path


def test_a_block_that_ends_well_makes_the_directory(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "target"
    with whole_directory(target) as scratch:
        (scratch / "a").write_text("new")
        assert not target.exists()
    assert files(tmp_path) == {"deep/er/target/a": "new"}


def test_a_block_that_ends_well_replaces_the_directory(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for content in ("old", "new"):
        with whole_directory(target) as scratch:
            (scratch / content).write_text(content)
    assert files(tmp_path) == {"target/new": "new"}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_the_old_directory(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "target"
    with whole_directory(target) as scratch:
        (scratch / "a").write_text("old")
    with pytest.raises(error), whole_directory(target) as scratch:
        (scratch / "a").write_text("new")
        raise error
    assert files(tmp_path) == {"target/a": "old"}
    assert list(tmp_path.iterdir()) == [target]


def test_a_block_that_raises_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), whole_directory(tmp_path / "target"):
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


def test_the_old_directory_is_put_back_when_the_new_one_is_gone(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with whole_directory(target) as scratch:
        (scratch / "a").write_text("old")
    with pytest.raises(FileNotFoundError), whole_directory(target) as scratch:
        scratch.rmdir()
    assert files(tmp_path) == {"target/a": "old"}


DEAD = 2**22 + 1  # above the largest process id


def left(folder: Path, name: str, kind: str, pid: int = DEAD) -> Path:
    path = folder / f".{name}.{kind}.{socket.gethostname()}-{pid}-0123abcd"
    path.mkdir()
    (path / "a").write_text(kind)
    return path


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left(tmp_path, "target", "new")
    own = left(tmp_path, "target", "new", os.getpid())
    others = tmp_path / ".hidden"
    others.mkdir()
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([own, others])
    remove_leftovers(tmp_path / "none")


def test_what_a_killed_process_had_put_aside_is_put_back(tmp_path: Path) -> None:
    """Unless what was to take its place is there."""
    left(tmp_path, "target", "old")
    left(tmp_path, "other.json", "old")
    (tmp_path / "other.json").write_text("there")
    remove_leftovers(tmp_path)
    assert files(tmp_path) == {"target/a": "old", "other.json": "there"}


def test_a_scratch_directory_is_gone_after_its_block_and_named_so_that_it_can_be_removed() -> None:
    with scratch_directory() as path:
        assert path.is_dir() and LEFT.fullmatch(path.name)
    assert not path.exists()


def test_a_place_that_cannot_hold_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with (
        pytest.raises(StorageError, match=r"expected a place to write .*/file/x/target, got .*Not a directory"),
        whole_directory(tmp_path / "file" / "x" / "target"),
    ):
        pass


def write_text(path: Path) -> None:
    path.write_text("x" * SIZE)


def write_array(path: Path) -> None:
    np.save(path, np.zeros(SIZE, np.uint8))


def write_arrow(path: Path) -> None:
    batch = pa.record_batch([pa.array(np.zeros(SIZE, np.uint8))], names=["a"])
    with pa.ipc.new_file(path, batch.schema) as writer:
        writer.write_batch(batch)


def write_tensor(path: Path) -> None:
    torch.save(torch.zeros(SIZE // 4), path)


def write_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(SIZE // 4)}, path)


@pytest.mark.parametrize("write", [write_text, write_array, write_arrow, write_tensor, write_safetensors])
def test_a_full_disk_is_said_and_costs_nothing(full_soon: Path, write: Callable[[Path], None]) -> None:
    target = full_soon / "target"
    expected = (
        r"no space left while writing .*/target \([01] MiB free\); nothing was left there: free some and run again"
    )
    with pytest.raises(StorageError, match=expected), whole_directory(target) as scratch:
        write(scratch / "a.npy")
    with whole_directory(target) as scratch:
        (scratch / "a").write_text("old")
    with pytest.raises(StorageError, match="the previous one is intact"), whole_directory(target) as scratch:
        write(scratch / "a.npy")
    assert files(full_soon) == {"target/a": "old"}


def test_a_full_disk_is_found_behind_other_errors() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    outer = RuntimeError("cannot save")
    outer.__cause__ = full
    assert is_disk_full(full)
    assert is_disk_full(outer)
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not is_disk_full(RuntimeError("cannot save"))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDISTIL_CACHE", "/a/cache")
    assert cache_dir() == Path("/a/cache")
    monkeypatch.delenv("RAYDISTIL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/b/raydistil")
    for unset in (lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""), lambda: monkeypatch.delenv("XDG_CACHE_HOME")):
        unset()
        assert cache_dir() == Path.home() / ".cache" / "raydistil"
