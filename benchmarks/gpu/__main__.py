"""Check and time the kernels on this machine's NVIDIA GPU: python -m benchmarks.gpu

Correctness first: a wrong result ends the run before anything is timed. Then the ceilings of this
device (a matrix product, a copy), attention against tuned FlexAttention, dense SDPA and causal
FlashAttention, mask metadata, decoding attention, and the loss. Every figure is a row of
benchmarks/results/gpu_DEVICE.csv, written as soon as it is known. About ten minutes, most of them
FlexAttention's autotuning. `--tune` times other tile sizes instead and prints the fastest.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.gpu.timing import CudaClock, Figure

RESULTS = Path(__file__).parent.parent / "results"
PARTS = ("ceilings", "attention", "metadata", "decode", "loss")


def figures(device: torch.device, parts: list[str], *, quick: bool) -> Iterator[Figure]:
    """Every figure of the named parts, in order."""
    from benchmarks.gpu import attention, ceilings, metadata, problem, serving

    clock, rounds = CudaClock(device), 7 if quick else 25
    name = torch.cuda.get_device_name(device)
    chip = next((chip for chip in ("H200", "A100") if chip in name), "")
    if "ceilings" in parts:
        n = 4096 if quick else 8192
        yield from ceilings.run(device, clock, n=n, size=1 << 30, rounds=rounds)
    cases = problem.CASES[:2] if quick else problem.CASES
    if "attention" in parts:
        for case in cases:
            goals = case.goals.get(chip, {})
            yield from attention.run(case, device, clock, rounds=rounds, goals=goals)
            torch.cuda.empty_cache()
    if "metadata" in parts:
        for case in cases[:2]:
            yield from metadata.bounds(case, device, clock, rounds=rounds)
            yield from metadata.causal(case, device, clock, rounds=rounds)
        yield metadata.recompilations(cases[1], device)
        yield metadata.flex_recompilations(cases[1], device)
    if "decode" in parts:
        for cache in serving.CACHES[:2] if quick else serving.CACHES:
            yield from serving.decoding(cache, device, clock, rounds=rounds)
    if "loss" in parts:
        for sizes in serving.LOSSES[:1] if quick else serving.LOSSES:
            peak = serving.cuda_peak
            yield from serving.losses(*sizes, device, clock, rounds=rounds, peak=peak)


def main(arguments: list[str] | None = None, say: Callable[[str], object] | None = None) -> int:
    """Run from the command line; the exit status."""
    say = say or (lambda text: print(text, flush=True))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds and shapes; writes no file"
    )
    parser.add_argument(
        "--tune", action="store_true", help="time other tile sizes and print the fastest"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        say(
            "no NVIDIA GPU is seen (torch.cuda.is_available() is false): nothing was measured. "
            "Where one is, install the CUDA environment first: make setup WHEELS=cuda"
        )
        return 1
    from benchmarks.gpu.checks import WrongResultError, verify
    from benchmarks.gpu.table import Table, file_of, machine

    device, began = torch.device("cuda", torch.cuda.current_device()), time.monotonic()
    where = machine(device)
    say(", ".join(where.values()))
    try:
        for line in verify(device, (torch.float16, torch.bfloat16, torch.float32), "triton"):
            say(line)
    except WrongResultError as error:
        say(f"wrong result: {error}")
        return 1
    if asked.tune:
        from benchmarks.gpu.tune import tune

        for line in tune(device, CudaClock(device)):
            say(line)
        return 0
    table = None if asked.quick else Table(file_of(asked.results, where["device"]), where)
    for row in figures(device, asked.parts or list(PARTS), quick=asked.quick):
        say(str(row)) if table is None else table.add(row)
    if table is not None:
        say(f"{time.monotonic() - began:.0f} s; written to {table.done()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
