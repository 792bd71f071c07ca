"""Kernels compiled ahead of time for a GPU that is not here, and what the compiler made of them.

    python -m abf_kernels.ahead [FILE.csv]    a row for every shipped configuration and target

An operator that has kernels lists what it ships in a function `builds()` of a module named in
`OPERATORS`. Targets are compute capabilities times ten: 80 is the A100, 90 the H100 and H200.
"""

from __future__ import annotations

import csv
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from abf_kernels.tuning import DEFAULT

OPERATORS: tuple[str, ...] = (
    "abf_kernels.block_attention.builds",
    "abf_kernels.masked_loss.builds",
    "abf_kernels.block_decode.builds",
)
"""Modules with `builds() -> Iterator[Build]`."""

TARGETS = (80, 90)
# Bytes of shared memory: (one block may have, with opt-in; a multiprocessor has, and each block
# takes 1 KiB more than it asked for). CUDA C++ programming guide, "Technical specifications per
# compute capability".
SHARED = {80: (163 << 10, 164 << 10), 90: (227 << 10, 228 << 10)}
REGISTERS = 65536  # 32-bit registers of a multiprocessor, on both
THREADS = 2048  # threads that a multiprocessor holds, on both
STACK = 80
"""Bytes of registers that a thread may spill at most, where a row says why it may."""
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def targets(architecture: str) -> tuple[int, ...]:
    """What tiles of an architecture are compiled for: its target, or all for the default."""
    return TARGETS if architecture == DEFAULT else (int(architecture.removeprefix("sm_")),)


@dataclass(frozen=True)
class Build:
    """One compilation: a kernel and all that a launch would choose for it."""

    operator: str
    case: str
    """What tells it from the operator's other builds, for example "forward bf16 D=128"."""
    kernel: Any
    """What `triton.jit` returned."""
    arguments: Mapping[str, Any]
    """Each argument by name: the value of a constexpr; of any other its type, such as "i32", "fp32"
    or "*bf16", with ":16" added where launches pass multiples of 16 (bytes, for a pointer)."""
    target: int
    num_warps: int
    num_stages: int
    spills: str = ""
    """Why it is shipped although it spills; empty means that it must not."""


@dataclass(frozen=True)
class Report:
    """What the compiler made of a `Build`; a row of the CSV."""

    operator: str
    case: str
    target: str
    tile: str
    """The constexpr arguments that are whole numbers."""
    num_warps: int
    num_stages: int
    registers: int
    """Of a thread, at most 255."""
    stack_bytes: int
    """Of a thread; more than 0 means that registers were spilled to memory."""
    shared_bytes: int
    shared_limit: int
    blocks_per_multiprocessor: int
    """How many fit at once, by registers, shared memory and threads; 0 cannot be launched."""
    mma_sync: int
    """Matrix instructions of sm_80, counted in the PTX, as are those that follow."""
    wgmma: int
    """Matrix instructions of sm_90 that read shared memory and do not wait."""
    cp_async: int
    """Copies from global to shared memory that do not wait (loads overlapped with arithmetic)."""
    spills: str
    triton: str


def compile_ahead(build: Build) -> triton.compiler.CompiledKernel:
    """Compile for the build's target, with no GPU and no driver.

    Raises:
        ValueError: arguments that are not the kernel's.
        RuntimeError: kernels are interpreted in this process (TRITON_INTERPRET was set when they
            were decorated).
    """
    kernel = build.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("compile kernels in a process that has no TRITON_INTERPRET")
    names = [parameter.name for parameter in kernel.params]
    if set(names) != set(build.arguments):
        difference = sorted(set(names) ^ set(build.arguments))
        raise ValueError(f"arguments must be those of {kernel.__name__}; differing: {difference}")
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value = build.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name], _, divisor = value.partition(":")
        if divisor:
            attributes[parameter.num,] = [["tt.divisibility", int(divisor)]]
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", build.target, 32),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages},
    )


def report(build: Build) -> Report:
    """Compile and read the result: registers, stack, shared memory and instructions."""
    compiled = compile_ahead(build)
    registers, stack = _resources(compiled.asm["cubin"])
    limit, whole = SHARED[build.target]
    shared = compiled.metadata.shared
    # Registers are given out to warps in multiples of 256.
    of_a_block = build.num_warps * -(-registers * 32 // 256) * 256
    blocks = min(
        REGISTERS // of_a_block, whole // (shared + 1024), THREADS // (32 * build.num_warps)
    )
    ptx = compiled.asm["ptx"]
    whole_numbers = {
        name: value
        for name, value in build.arguments.items()
        if isinstance(value, int) and not isinstance(value, bool)
    }
    return Report(
        operator=build.operator,
        case=build.case,
        target=f"sm_{build.target}",
        tile=" ".join(f"{name}={value}" for name, value in whole_numbers.items()),
        num_warps=build.num_warps,
        num_stages=build.num_stages,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=shared,
        shared_limit=limit,
        blocks_per_multiprocessor=blocks if shared <= limit else 0,
        mma_sync=len(re.findall(r"\bmma\.sync", ptx)),
        wgmma=len(re.findall(r"\bwgmma\.mma_async", ptx)),
        cp_async=len(re.findall(r"\bcp\.async\.(?:ca|cg|bulk\.tensor)", ptx)),
        spills=build.spills,
        triton=triton.__version__,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a thread, as the wheel's own cuobjdump tells them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    if found is None:
        raise RuntimeError(f"cuobjdump told no resources: {told!r}")
    return int(found[1]), int(found[2])


def shipped() -> Iterator[Build]:
    """The builds of all operators."""
    for module in OPERATORS:
        yield from importlib.import_module(module).builds()


def main(path: str | None = None) -> None:
    """Print what the shipped configurations compile to, and write it as a CSV."""
    rows = []
    for build in shipped():
        row = report(build)
        rows.append(asdict(row))
        print(
            f"{row.target} {row.operator} {row.case:<24} {row.tile:<28} {row.num_warps} warps "
            f"{row.num_stages} stages: {row.registers} registers, {row.stack_bytes} B stack, "
            f"{row.shared_bytes / 1024:.0f} of {row.shared_limit >> 10} KiB shared, "
            f"{row.blocks_per_multiprocessor} a multiprocessor; {row.mma_sync} mma.sync, "
            f"{row.wgmma} wgmma, {row.cp_async} cp.async",
            flush=True,
        )
    if path is not None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
