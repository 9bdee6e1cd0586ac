"""What is read of the processor."""

from pathlib import Path

import pytest

from raydistil.processor import flags, multiplies_bfloat16


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
