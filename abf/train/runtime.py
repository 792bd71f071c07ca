"""What a bit-exact resume depends on besides the configuration, and the settings that fix it.

Same bits need the same processor kind, instruction set, thread count, library versions, precision
and number of ranks (notes: feasibility §2 and §3). Checkpoints record them; a resume compares.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR")
"""Environment variables that change the instructions in use, hence the last bits."""


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
KEPT_BYTES = 1 << 30
"""Blocks up to this size come from the heap, which never shrinks."""


def environment(
    *, device: torch.device, precision: str, world_size: int, sharding: str
) -> dict[str, str]:
    """Facts that decide the last bits of a run, by name."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": _cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability()
        + "".join(f" {name}={os.environ[name]}" for name in LIMITS if name in os.environ),
        "threads": str(torch.get_num_threads()),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "precision": precision,
        "world_size": str(world_size),
        "sharding": sharding,
    }


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """One phrase for each fact that changed, `name: before -> now`."""
    return [
        f"{name}: {before.get(name, 'not recorded')} -> {now.get(name, 'not recorded')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


@contextlib.contextmanager
def settings(*, threads: int) -> Iterator[None]:
    """Fix the thread count and ask for deterministic kernels; the caller's are put back after.

    Memory that a step frees stays with the process, see `keep_freed_memory`.
    """
    keep_freed_memory()
    # The module computes this attribute, so the type checker cannot see it.
    memory: Any = torch.utils.deterministic
    before = torch.get_num_threads()
    deterministic = torch.get_deterministic_debug_mode()
    fill = memory.fill_uninitialized_memory
    torch.set_num_threads(threads)
    # Without it, gradients of indexed rows are added by racing threads. Where a GPU has no such
    # kernel, the run goes on and says so: some last bits are no reason to stop it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    memory.fill_uninitialized_memory = False  # poison for debugging; costs a pass over each tensor
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_deterministic_debug_mode(deterministic)
        memory.fill_uninitialized_memory = fill


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed tensors instead of returning them to the system.

    By default every large tensor is mapped and its pages are zeroed anew each time, which took a
    fifth of a small model's step. The peak stays what it was. Other C libraries are left alone.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
