"""API keys: who may ask, and how often. The file holds hashes: nobody can ask with what stands in it.

A line a key: its name, the SHA-256 of the key in hexadecimal, and requests a second if they are bounded.
"""

import hashlib
import hmac
import math
import re
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

from raydistil.errors import ConfigError, StorageError

PREFIX = "rd-"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(slots=True)
class Key:
    """One that is known. Requests a second are counted by each replica for itself; a second's may come at once."""

    name: str
    hash: str
    rate: float | None = None
    _left: float = field(default=0.0, init=False)
    _since: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._left, self._since = self._burst(), time.monotonic()

    def wait_s(self) -> float:
        """0 for a request that may come now, and is counted; else how long it must wait."""
        if self.rate is None:
            return 0.0
        now = time.monotonic()
        self._left = min(self._burst(), self._left + (now - self._since) * self.rate)
        self._since = now
        if self._left < 1:
            return (1 - self._left) / self.rate
        self._left -= 1
        return 0.0

    def _burst(self) -> float:
        return max(1.0, self.rate or 0.0)


class Keys:
    def __init__(self, known: list[Key]) -> None:
        self._known = known

    def owner(self, given: str) -> Key | None:
        """Of a key that somebody sent. It takes as long whichever it is."""
        digest, found = hash_of(given), None
        for key in self._known:
            if hmac.compare_digest(key.hash, digest):
                found = key
        return found


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf8", "surrogatepass")).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """Raises StorageError for a file that is not there, ConfigError for a line that is no key, or none at all."""
    keys = _keys(path)
    if not keys:
        raise ConfigError(f"{path}: expected at least one API key, found none: make one with raydistil key")
    return keys


def _keys(path: Path) -> list[Key]:
    """Raises as `read_keys` does, but for a file without any."""
    try:
        lines = path.read_text(encoding="utf8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"expected API keys at {path}, got {error}: make one with raydistil key") from error
    keys = [_key(path, number, line) for number, line in enumerate(lines, 1) if line.strip() and line[0] != "#"]
    names = [key.name for key in keys]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{path}: expected a name once, got {twice} twice: leave one out")
    return keys


def _key(path: Path, number: int, line: str) -> Key:
    parts = line.split()
    if not (
        len(parts) in (2, 3) and NAME.fullmatch(parts[0]) and HASH.fullmatch(parts[1]) and all(map(_is_rate, parts[2:]))
    ):
        raise ConfigError(
            f"{path}, line {number}: expected a name, the SHA-256 of a key and perhaps requests a second, got "
            f"{line[:80]!r}: make it with raydistil key"
        )
    return Key(parts[0], parts[1], float(parts[2]) if parts[2:] else None)


def _is_rate(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def add_key(path: Path, name: str, rate: float | None) -> str:
    """A new key; its hash is appended to the file. Raises ConfigError for a name that is none, or is taken."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"expected a name of letters, digits, '.', '_' and '-', got {name!r}")
    before = path.read_bytes() if path.exists() else b""
    if before and name in {key.name for key in _keys(path)}:
        raise ConfigError(f"{path}: expected a new name, {name} has a key: take its line out first")
    made = PREFIX + secrets.token_urlsafe(32)
    bound = "" if rate is None else f" {rate:g}"
    end = "" if not before or before.endswith(b"\n") else "\n"
    with path.open("a", encoding="utf8") as file:
        file.write(f"{end}{name} {hash_of(made)}{bound}\n")
    path.chmod(0o600)
    return made
