"""What the planning machine's processor can do, read without importing torch."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")
"""Names in /proc/cpuinfo of bfloat16 matrix or dot-product instructions (x86, Arm)."""


@cache
def bf16_instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The processor's bf16 instruction set, or none: then bf16 is emulated, up to 35x slower."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            present = set(flags.split())
            return next((flag for flag in BF16_FLAGS if flag in present), None)
    return None


def resolve_precision(gpus: int = 0) -> tuple[str, str]:
    """What `precision: auto` means here, and why.

    Args:
        gpus: of the nodes that jobs run on; a login node's own processor says nothing of those.
    """
    if gpus:
        return "bf16", f"jobs run on nodes of {gpus} GPUs"
    if found := bf16_instructions():
        return "bf16", f"{platform.machine()} with {found}"
    return "fp32", f"{platform.machine()} without bf16 instructions"
