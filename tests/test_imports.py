"""Imports run one way: a module may import those before it in this list, and none after it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import raydistil

ORDER = (
    "errors", "types", "processor", "config", "layers", "storage", "raylet", "corpus", "manifest", "steps",
    "checkpoint", "masking", "packing", "augment", "documents", "places", "tokens", "warm", "specs", "heads", "models",
    "roofline", "size", "codecs", "targets", "ensemble", "wire", "cache", "source", "plan", "turns", "losses",
    "attention", "distiller", "partitioned", "student", "optim", "teacher", "pace", "payload", "stream", "fill",
    "trace", "tally", "progress", "report", "resume", "saving", "worker", "processes", "cluster", "rundir",
    "chain", "elastic", "train", "scores", "evaluate", "prune", "compared", "prepare", "export", "stages", "pipeline",
    "probe", "check", "doctor", "tables", "serve", "bench", "cli", "__main__",
)  # fmt: skip
ROOT = Path(raydistil.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def stage(path: Path) -> str:
    """The module or folder of raydistil that `path` belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of everything of raydistil that is imported, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "raydistil")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            if (node.module or "").split(".")[0] == "raydistil":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_names_are_found_however_they_are_imported() -> None:
    tree = ast.parse("""
import os, raydistil.plan
from raydistil import wire, rundir
def late():
    from raydistil.corpus.files import expand
    from raydistilled import other
""")
    assert set(imported(tree)) == {
        "raydistil.plan",
        "raydistil.wire",
        "raydistil.rundir",
        "raydistil.corpus.files.expand",
    }


def test_every_module_is_in_the_list() -> None:
    assert {stage(path) for path in FILES} == set(ORDER)
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_earlier_ones(path: Path) -> None:
    own = stage(path)
    names = {name.split(".")[1] for name in imported(ast.parse(path.read_text(encoding="utf8"))) if "." in name}
    later = [name for name in names - {own} if ORDER.index(name) > ORDER.index(own)]
    assert later == []


def test_the_package_itself_imports_nothing() -> None:
    assert list(imported(ast.parse((ROOT / "__init__.py").read_text(encoding="utf8")))) == []


@pytest.mark.parametrize("module", ["raydistil.source", "raydistil.stream", "raydistil.teacher", "raydistil.progress"])
def test_processes_that_make_no_tensors_are_spared_torch(module: str) -> None:
    """Those that read, deal out and count: each would take seconds more to start."""
    code = f"import sys, {module}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
