"""What is read of the processor."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from raydistil import processor
from raydistil.config.teacher import TeacherConfig
from raydistil.config.train import TrainConfig
from raydistil.processor import fast_precision, flags, multiplies_bfloat16


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16 amx_bf16", True),
        ("flags\t\t: fpu avx2 fma", False),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("Features\t: fp asimd", False),
    ],
)
def test_bfloat16_is_what_the_system_says(line: str, expected: bool, tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n")
    assert {"fpu", "fp"} & flags(path)
    assert multiplies_bfloat16(flags(path)) is expected


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    assert flags(tmp_path / "none") == set()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the GPU counts")
@pytest.mark.parametrize(("has", "expected"), [({"avx2", "amx_bf16"}, "bfloat16"), ({"avx2"}, "float32")])
def test_auto_is_what_the_machine_is_fast_at(monkeypatch: pytest.MonkeyPatch, has: set[str], expected: str) -> None:
    """In a configuration it is resolved at once, so that what is kept of a run says which."""
    monkeypatch.setattr(processor, "flags", lambda: has)
    assert fast_precision() == expected
    assert (TeacherConfig(model="m", precision="auto").precision, TrainConfig(precision="auto").precision) == (
        expected, expected,
    )  # fmt: skip
    assert TrainConfig(precision="bfloat16").precision == "bfloat16"


def test_an_unknown_precision_is_told_what_there_is() -> None:
    with pytest.raises(ValidationError, match="expected auto, float32 or bfloat16"):
        TrainConfig(precision="fp8")
