"""Check and time the kernels on this machine's NVIDIA GPU: python -m benchmarks.gpu

Correctness first: a wrong result ends the run before anything is timed. Then the ceilings of this
device (a matrix product, a copy), mask metadata, decoding attention, the loss, and attention
against tuned FlexAttention, dense SDPA and causal FlashAttention. Every figure is a row of
benchmarks/results/gpu_DEVICE.csv, on disk as soon as it is known. No job is begun after `--minutes`
(most of them are FlexAttention's autotuning); the same command goes on from where it was. `--tune`
times other tile sizes instead and writes the fastest into each operator's configs.json.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu.table import Table, file_of, machine
from benchmarks.gpu.timing import Clock, CudaClock, Figure

RESULTS = Path(__file__).parent.parent / "results"
PARTS = ("ceilings", "metadata", "causal", "decode", "loss", "attention", "graphs")
MINUTES, TUNING = 10.0, 60.0


class Job(NamedTuple):
    """Figures that belong together; what is kept or begun anew when an interrupted run goes on."""

    part: str
    name: str
    run: Callable[[], Iterator[Figure]]


def jobs(device: torch.device, clock: Clock, *, quick: bool) -> list[Job]:
    """What there is to measure, the cheap first: FlexAttention's compilation takes most time."""
    from benchmarks.gpu import attention, causal, ceilings, metadata, problem, serving

    rounds, n = (7, 4096) if quick else (25, 8192)
    name = torch.cuda.get_device_name(device)
    chip = next((chip for chip in ("H200", "A100") if chip in name), "")
    cases = problem.CASES[:2] if quick else problem.CASES
    peak = serving.cuda_peak
    found = [
        Job("ceilings", "", partial(ceilings.run, device, clock, n=n, size=1 << 30, rounds=rounds))
    ]
    for case in cases[:2]:
        work = partial(metadata.run, case, device, clock, rounds=rounds)
        found.append(Job("metadata", str(case), work))
        work = partial(causal.run, case, device, clock, rounds=rounds)
        found.append(Job("causal", str(case), work))
    for cache in serving.CACHES[:2] if quick else serving.CACHES:
        work = partial(serving.decoding, cache, device, clock, rounds=rounds)
        found.append(Job("decode", str(cache), work))
    for sizes in serving.LOSSES[:1] if quick else serving.LOSSES:
        work = partial(serving.losses, *sizes, device, clock, rounds=rounds, peak=peak)
        found.append(Job("loss", "R={} d={} V={}".format(*sizes), work))
    for case in cases:
        goals = case.goals.get(chip, {})
        work = partial(attention.run, case, device, clock, rounds=rounds, goals=goals)
        found.append(Job("attention", str(case), work))
    work = partial(metadata.flex_recompilations, cases[1], device)
    return [*found, Job("graphs", str(cases[1]), work)]


def measure(
    todo: Sequence[Job], table: Table | None, say: Callable[[str], object], *, minutes: float
) -> bool:
    """Run jobs until they are done or the time is up; whether all of them are done.

    A job that fails is told with its traceback and does not keep others from running.
    """
    began, left = time.monotonic(), []
    for number, job in enumerate(todo, 1):
        name = f"{job.part} {job.name}".strip()
        spent = time.monotonic() - began
        if table is not None and table.has(name):
            say(f"[{number}/{len(todo)}] {name}: kept from the run before")
            continue
        if spent > 60 * minutes:
            left.append(f"{name}: the {minutes:g} minutes are over")
            continue
        say(f"[{number}/{len(todo)}, {spent:.0f} s] {name}")
        try:
            for row in job.run():
                say(str(row)) if table is None else table.add(row, name)
        except Exception:
            say(traceback.format_exc())
            left.append(f"{name}: failed, see above")
        else:
            if table is not None:
                table.finish(name, time.monotonic() - began - spent)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    for line in left:
        say(f"not measured: {line}")
    return not left


def tuned(
    device: torch.device,
    where: Mapping[str, str],
    say: Callable[[str], object],
    *,
    minutes: float,
) -> int:
    """Measure tiles of every operator and write the fastest into its configs.json."""
    from benchmarks.gpu.tune import fastest, searches, write

    began, clock = time.monotonic(), CudaClock(device)
    source = f"measured on {where['device']} at {where['git_sha']}, Triton {where['triton']}"
    for search in searches(device):
        if time.monotonic() - began > 60 * minutes:
            say(f"not measured: {search.operator} D={search.dim}: {minutes:g} minutes are over")
            continue
        row = fastest(search, torch.cuda.get_device_capability(device), source, clock, say)
        write(search.operator, row)
    say("next: make kernels-report, python -m benchmarks.performance, and the tests")
    return 0


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
        "--tune", action="store_true", help="time other tile sizes and write the fastest"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"begin no job after so many (default {MINUTES:g}, {TUNING:g} with --tune)",
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

    device = torch.device("cuda", torch.cuda.current_device())
    where = machine(device)
    say(", ".join(where.values()))
    try:
        for line in verify(device, (torch.float16, torch.bfloat16, torch.float32), "triton"):
            say(line)
    except WrongResultError as error:
        say(f"wrong result: {error}")
        return 1
    if asked.tune:
        return tuned(device, where, say, minutes=asked.minutes or TUNING)
    table = None if asked.quick else Table(file_of(asked.results, where["device"]), where)
    parts = asked.parts or list(PARTS)
    todo = [job for job in jobs(device, CudaClock(device), quick=asked.quick) if job.part in parts]
    whole = measure(todo, table, say, minutes=asked.minutes or MINUTES)
    if table is not None and whole:
        say(f"written to {table.done(whole=not asked.parts)}")
    elif table is not None:
        say(f"what was measured is in {table.partial}; the same command goes on from there")
    return 0 if whole else 2


if __name__ == "__main__":
    sys.exit(main())
