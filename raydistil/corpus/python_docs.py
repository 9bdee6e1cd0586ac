"""Source `python-docs`: the docstrings of the standard library and of the packages installed beside raydistil.

Real technical English that is on every machine. Nothing is imported: files are parsed with `ast`. The label is the
top-level import name. Files come in an order fixed by a hash of their module name, and only as many are parsed as
the caps need; the split goes by module, so near-twins in one file never stand on both sides.
"""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path

from raydistil.config import CorpusConfig
from raydistil.corpus.caps import Caps
from raydistil.corpus.split import split_of
from raydistil.errors import DataError
from raydistil.types import TextRow

SKIPPED_FOLDERS = {
    "test", "tests", "testing", "_vendor", "vendor", "vendored", "_distutils", "third_party", "thirdparty_files",
    "site-packages", "idlelib", "lib2to3", "__pycache__", "node_modules",
}  # fmt: skip
FORMAT = 1  # raise when other rows come out of the same files
MIN_WORDS = 6
WAVE = 96  # files in work at a time
CHUNK = 8  # files that a process is given at once
FEW = 32  # files that are parsed here, sooner than processes start
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no file can hold
ENGLISH = re.compile(r"\b(the|a|an|of|to|and|is|in|for|if|with|this|return|returns|that|or|by)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A Python file and the module it is."""

    path: Path
    module: str
    label: str


@dataclass(frozen=True, slots=True)
class ParsedFile:
    """What one file holds: (qualname, text) of each docstring, and the hash of its bytes."""

    content_hash: str
    texts: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Reading:
    """Rows, and the content hash of every module they (or their absence) came from."""

    rows: list[TextRow]
    hashes: dict[str, str]


def list_files(libraries: tuple[str, ...]) -> list[SourceFile]:
    """The files of `libraries` (of everything installed where empty), in hash order.

    Raises DataError for a library that is not installed.
    """
    roots = _roots()
    names = libraries or tuple(sorted({name for root in roots for name in _top_level(root)}))
    files = []
    for name in names:
        found = [file for root in roots for file in _files_of(root, name)]
        if not found and libraries:
            raise DataError(f"corpus.libraries: {name!r} is not installed here: install it or leave it out")
        files += found
    return sorted(files, key=lambda file: (_hash(file.module), file.module))


def read(config: CorpusConfig, files: list[SourceFile]) -> Reading:
    """Deduplicated rows in a fixed order, until the caps of `config` are reached."""
    caps = Caps(config)
    seen: set[bytes] = set()
    reading = Reading([], {})
    for file, parsed in _parsed(files, caps):
        reading.hashes[file.module] = parsed.content_hash
        kept = 0
        for qualname, text in parsed.texts:
            fingerprint = _fingerprint(text)
            if fingerprint in seen or not caps.open(file.label) or kept == config.max_rows_per_module:
                continue
            seen.add(fingerprint)
            kept += 1
            caps.count(file.label)
            split = split_of(file.module, config)
            reading.rows.append(TextRow(text, file.label, f"{file.module}:{qualname}", split))
    return reading


def _parsed(files: list[SourceFile], caps: Caps) -> Iterator[tuple[SourceFile, ParsedFile]]:
    """Parse `files` in order on all cores, skipping those whose label is full when their turn comes.

    A wave of files is in work at a time; the rows depend on the order of the files alone, never on the cores.
    """
    workers = min(cpu_count() or 1, -(-WAVE // CHUNK))
    rest = iter(files)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        while wave := list(islice((file for file in rest if caps.open(file.label)), WAVE)):
            paths = [file.path for file in wave]
            parsed = map(parse, paths) if len(wave) <= FEW else pool.map(parse, paths, chunksize=CHUNK)
            yield from zip(wave, parsed, strict=True)


def parse(path: Path) -> ParsedFile:
    """The docstrings of the module, classes and functions in `path` that read as English.

    A file that Python itself cannot read holds none.
    """
    content = path.read_bytes()
    try:
        with warnings.catch_warnings(action="ignore"):
            texts = list(_walk(ast.parse(content), ""))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        texts = []
    return ParsedFile(content_hash(content), [(name, text) for name, text in texts if is_english(text)])


def content_hash(content: bytes) -> str:
    return blake2b(content, digest_size=8).hexdigest()


def _walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield prefix or "module", text
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", None) if isinstance(child, ast.stmt) else None
        if isinstance(child, ast.stmt):
            yield from _walk(child, f"{prefix}.{name}".lstrip(".") if name else prefix)


def is_english(text: str) -> bool:
    """At least six words, two of them English function words, and nearly all characters ASCII."""
    words = len(text.split())
    ascii_share = sum(character < "\x80" for character in text) / len(text)
    plain = ascii_share > 0.95 and not SURROGATE.search(text)
    return words >= MIN_WORDS and plain and len(ENGLISH.findall(text, 0, 2000)) >= 2


def _fingerprint(text: str) -> bytes:
    """Equal for texts that differ in case, digits, space or punctuation only."""
    return blake2b(re.sub(r"[\W\d_]+", " ", text.lower()).strip().encode(), digest_size=12).digest()


def _hash(name: str) -> bytes:
    return blake2b(name.encode(), digest_size=8).digest()


def _roots() -> list[Path]:
    paths = sysconfig.get_paths()
    roots = dict.fromkeys(Path(paths[name]).resolve() for name in ("stdlib", "purelib", "platlib"))
    return [root for root in roots if root.is_dir()]


def _top_level(root: Path) -> list[str]:
    return [
        entry.stem for entry in root.iterdir()
        if entry.stem.isidentifier() and entry.name not in SKIPPED_FOLDERS
        and (entry.suffix == ".py" or (entry.is_dir() and (entry / "__init__.py").exists()))
    ]  # fmt: skip


def _files_of(root: Path, name: str) -> list[SourceFile]:
    single = root / f"{name}.py"
    paths = [single] if single.is_file() else sorted((root / name).rglob("*.py"))
    return [SourceFile(path, _module(root, path), name) for path in paths if path.is_file() and _wanted(root, path)]


def _wanted(root: Path, path: Path) -> bool:
    return not SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1]) and not path.stem.startswith("test_")


def _module(root: Path, path: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
