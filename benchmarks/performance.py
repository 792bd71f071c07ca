"""docs/performance.md's tables and figures, from the CSV files of benchmarks/results.

python -m benchmarks.performance            # write them
python -m benchmarks.performance --check    # fail where they are not those of the CSV files
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from abf.report.svg import PALETTE, Style, svg_text

ROOT = Path(__file__).parent.parent
RESULTS, PAGE, FIGURES = (
    ROOT / "benchmarks/results",
    ROOT / "docs/performance.md",
    ROOT / "docs/figures",
)
BEGIN, END = "<!-- {name}: written by python -m benchmarks.performance -->", "<!-- end -->"
NOT_MEASURED = "not measured on a GPU"
GPU_GOALS = (
    ("forward, ours, B=4 H=16 2L=8192 D=128 G=16", "H200", ">= 360 (reach for 450) TFLOP/s"),
    ("backward, ours, B=4 H=16 2L=8192 D=128 G=16", "H200", ">= 280 (reach for 350) TFLOP/s"),
    ("forward, ours over Flex, B=4 H=16 2L=8192 D=128 G=16", "H200", ">= 1.25x"),
    ("backward, ours over Flex, B=4 H=16 2L=8192 D=128 G=16", "H200", ">= 1.3x"),
    ("forward, ours over Flex FLASH, B=4 H=16 2L=8192 D=128 G=16", "H200", "reported"),
    ("forward, ours, B=4 H=16 2L=8192 D=128 G=16", "A100", ">= 150 TFLOP/s"),
    ("backward, ours, B=4 H=16 2L=8192 D=128 G=16", "A100", ">= 120 TFLOP/s"),
    ("forward+backward, ours over Flex, B=16 H=16 2L=2048 D=128 G=16", "H200", ">= 1.6x"),
    ("mask metadata: bounds and lists of a step, B=4 H=16 2L=8192 D=128 G=16", "H200", "<= 50 us"),
    ("kernels compiled over 100 segmentations, B=16 H=16 2L=2048 D=128 G=16", "H200", "0"),
    ("decode, share of copy bandwidth, B=1 keys=131072 block=32 H=32 G=8 D=128", "H200", ">= 0.7"),
)
"""Figure of `benchmarks.gpu`, device, goal."""
CPU_GOALS = {
    "forward+backward, bf16, B=1 H=8 2L=4096 D=64": 2.6,
    "forward+backward, fp32, B=1 H=8 2L=4096 D=64": 2.5,
    "memory beyond output and gradients, bf16, B=1 H=8 2L=4096 D=64": 4,
    "memory beyond output and gradients, fp32, B=1 H=8 2L=4096 D=64": 4,
    "mask metadata: ranges (goal 500), 2L=4096": 500,
}


def rows_of(name: str) -> list[dict[str, str]]:
    """Rows of a file of results; none if it is not there."""
    path = RESULTS / name
    if not path.exists():
        return []
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def value(row: dict[str, str]) -> str:
    """A figure with its interval."""
    figures = (float(row[name]) for name in ("value", "low", "high"))
    return "{:.3g} [{:.3g}, {:.3g}]".format(*figures)


def cpu_table() -> str:
    """Attention on the CPU."""
    found = rows_of("cpu_attention.csv")
    body = (
        [row["figure"], value(row), str(CPU_GOALS.get(row["figure"], "")), row["detail"]]
        for row in found
    )
    where = f"{found[0]['device']}, torch {found[0]['torch']}, at {found[0]['git_sha']}"
    return f"{where}.\n\n" + table(["figure", "measured", "goal", "detail"], body)


def gpu_table() -> str:
    """What the kernels should reach on GPUs, and what was measured there."""
    measured = {
        (row["figure"], row["device"]): row
        for path in sorted(RESULTS.glob("gpu_*.csv"))
        for row in rows_of(path.name)
    }

    def found(figure: str, chip: str) -> str:
        for (name, device), row in measured.items():
            if name == figure and chip in device:
                return f"{value(row)} {row['unit']} ({device}, {row['git_sha']})"
        return NOT_MEASURED

    body = ([figure, chip, goal, found(figure, chip)] for figure, chip, goal in GPU_GOALS)
    return table(["figure", "on", "goal", "measured"], body)


def compiled_table() -> str:
    """What the compiler made of the kernels in bfloat16."""
    body = (
        [row["operator"], row["case"], row["target"], row["registers"], row["stack_bytes"],
         f"{int(row['shared_bytes']) / 1024:.0f} of {int(row['shared_limit']) // 1024}",
         row["blocks_per_multiprocessor"], _instructions(row)]
        for row in rows_of("kernels_ahead.csv")
        if "bf16" in row["case"] and "default" not in row["case"]
    )  # fmt: skip
    head = ["operator", "case", "for", "registers", "stack, B", "shared, KiB", "at once", "uses"]
    return table(head, body)


def _instructions(row: dict[str, str]) -> str:
    names = {"mma_sync": "mma.sync", "wgmma": "wgmma", "cp_async": "cp.async"}
    return ", ".join(name for key, name in names.items() if int(row[key])) or "none of these"


def bars(rows: Sequence[dict[str, str]], label: str, goals: dict[str, float]) -> str:
    """One bar a figure, with its interval, and a mark where the goal is."""
    with Style() as plt:
        figure, axis = plt.subplots(figsize=(7.6, 0.7 + 0.34 * len(rows)))
        for y, row in enumerate(rows):
            low, middle, high = (float(row[name]) for name in ("low", "value", "high"))
            axis.barh(y, middle, height=0.6, color=PALETTE[0], alpha=0.75)
            axis.plot([low, high], [y, y], color="black", lw=1.2)
            if (goal := goals.get(row["figure"])) is not None:
                axis.plot([goal, goal], [y - 0.42, y + 0.42], color=PALETTE[1], lw=2)
        axis.set_yticks(range(len(rows)), [row["figure"] for row in rows])
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.set_xlabel(label)
        axis.grid(axis="y", visible=False)
        return svg_text(figure)


def outputs() -> dict[Path, str]:
    """Every file, with what it should hold."""
    attention = rows_of("cpu_attention.csv")
    speed = [row for row in attention if row["figure"].startswith("forward")]
    share = [row for row in attention if row["figure"].startswith("share")]
    page = PAGE.read_text()
    sections = (("cpu", cpu_table()), ("gpu", gpu_table()), ("compiled", compiled_table()))
    for name, text in sections:
        begin = BEGIN.format(name=name)
        if page.count(begin) != 1:
            raise SystemExit(f"{PAGE} must hold the line {begin} once, and {END} behind it")
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(END)
        page = f"{before}{begin}\n{text}\n{END}{after}"
    over = "times faster than SDPA with a dense boolean mask (orange: the goal)"
    ceiling = "share of the rate of a large matrix product in the same rounds"
    return {
        PAGE: page,
        FIGURES / "attention_speed.svg": bars(speed, over, CPU_GOALS),
        FIGURES / "attention_ceiling.svg": bars(share, ceiling, {}),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.performance", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it differs")
    asked = parser.parse_args(arguments)
    stale = []
    for path, text in outputs().items():
        if path.exists() and path.read_text() == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if not asked.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    if stale and asked.check:
        print(f"not those of benchmarks/results: {', '.join(stale)}; run")
        print("python -m benchmarks.performance")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
