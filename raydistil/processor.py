"""Which products this machine is fast at."""

from pathlib import Path

from raydistil.types import Precision

BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is Arm's


def flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """As Linux names them; none elsewhere."""
    if not cpuinfo.exists():
        return set()
    lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features")))
    return set(next(lines, "").split())


def multiplies_bfloat16(found: set[str]) -> bool:
    """Whether it has instructions for it. Without them products are emulated, and slower than those of float32."""
    return not BFLOAT16.isdisjoint(found)


def fast_precision() -> Precision:
    """bfloat16 where the GPU, or without one the processor, has instructions for it, else float32."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if multiplies_bfloat16(flags()) else "float32"
