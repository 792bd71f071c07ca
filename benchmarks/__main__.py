"""`make bench`: run every benchmark, print the table, write it to benchmarks/results/."""

from __future__ import annotations

import argparse
import csv
import importlib
import platform
from pathlib import Path

import torch

from abf.hardware import bf16_instructions
from abf.stage import git_sha

HERE = Path(__file__).parent


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} x{len(names)}, {bf16_instructions()}"


def main() -> None:
    """Run the named benchmarks, or all."""
    known = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; or all")
    parser.add_argument("--quick", action="store_true", help="few rounds, small sizes; no file")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(known):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    common = {"device": _cpu(), "torch": torch.__version__, "git_sha": git_sha()}
    for name in arguments.names or known:
        rows = importlib.import_module(f"benchmarks.bench_{name}").run(quick=arguments.quick)
        for row in rows:
            figures = f"{row['value']:10.4g}  [{row['low']:.4g}, {row['high']:.4g}] {row['unit']}"
            print(f"{name:<10} {row['figure']:<64} {figures:<44} {row['detail']}", flush=True)
        if not arguments.quick:
            path = HERE / "results" / f"cpu_{name}.csv"
            path.parent.mkdir(exist_ok=True)
            with open(path, "w", newline="") as handle:
                writer = csv.DictWriter(handle, [*rows[0], *common])
                writer.writeheader()
                writer.writerows({**row, **common} for row in rows)


if __name__ == "__main__":
    main()
