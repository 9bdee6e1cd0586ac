"""What the processor says it can do."""

from pathlib import Path

BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is Arm's


def flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """As Linux names them; none elsewhere."""
    if not cpuinfo.exists():
        return set()
    lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features")))
    return set(next(lines, "").split())


def multiplies_bfloat16(found: set[str]) -> bool:
    """Whether it has instructions for it. Without them products take several times as long as in float32."""
    return not BFLOAT16.isdisjoint(found)
