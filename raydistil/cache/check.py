"""What a cache holds already: which shards are there and whole.

A shard is looked at once, byte by byte; after that its size and time vouch for it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raydistil.cache.files import fault_of
from raydistil.cache.layout import Shard, path_of, shards
from raydistil.specs import CacheSpec
from raydistil.storage import remove_leftovers, whole_file

VERIFIED = "verified.json"
INPUTS = "cache.json"

Stamp = list[int]  # size in bytes, time of change in ns


def missing_shards(spec: CacheSpec, say: Callable[[str], None]) -> list[Shard]:
    """The shards that must be written; what is there and broken is removed, and said."""
    seen = _verified(spec)
    absent: list[Shard] = []
    for shard in shards(spec):
        path = path_of(spec, shard)
        if not path.exists():
            absent.append(shard)
        elif seen.get(shard.name) != _stamp(path):
            fault = fault_of(path, shard.num_rows, {"fingerprint": spec.fingerprint, "shard": shard.name})
            if fault is not None:
                say(f"targets: {path} is broken ({fault}), written anew")
                path.unlink()
                absent.append(shard)
    for folder in {path_of(spec, shard).parent for shard in shards(spec)}:
        remove_leftovers(folder)
    return absent


def vouch(spec: CacheSpec) -> int:
    """Write down that what is there now is whole; returns its bytes."""
    stamps = {shard.name: _stamp(path_of(spec, shard)) for shard in shards(spec)}
    _write_json(spec.path / VERIFIED, _verified(spec) | stamps)
    return sum(size for size, _ in stamps.values())


def describe_inputs(spec: CacheSpec, inputs: dict[str, Any]) -> str | None:
    """Write down what the cache depends on; a line for the user where those beside it are of other inputs."""
    if (spec.path / INPUTS).exists():
        return None
    beside = [json.loads(path.read_text()) for path in spec.path.parent.glob(f"*/{INPUTS}")]
    _write_json(spec.path / INPUTS, inputs)
    if not beside:
        return None
    nearest = min((_differing(inputs, other) for other in beside), key=len)
    return (
        f"targets: {spec.path.parent} has those of other inputs ({', '.join(nearest)}), which are left alone; these go "
        f"to {spec.path}"
    )


def _differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    return [key for key in sorted({*first, *second}) if first.get(key) != second.get(key)]


def _verified(spec: CacheSpec) -> dict[str, Stamp]:
    try:
        stamps: dict[str, Stamp] = json.loads((spec.path / VERIFIED).read_text())
    except (OSError, ValueError):
        return {}
    return stamps


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _write_json(path: Path, value: Any) -> None:
    with whole_file(path) as scratch:
        scratch.write_text(json.dumps(value, indent=1) + "\n")
