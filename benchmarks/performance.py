"""docs/performance.md's tables and figures, from the CSV files of benchmarks/results.

python -m benchmarks.performance            # write them
python -m benchmarks.performance --check    # fail where they are not those of the CSV files
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

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


def where(rows: Sequence[dict[str, str]]) -> str:
    """What rows were measured on, and of which commit."""
    return "{device}, torch {torch}, at {git_sha}.".format(**rows[0])


def cpu_table() -> str:
    """Attention on the CPU."""
    found = rows_of("cpu_attention.csv")
    body = (
        [row["figure"], value(row), str(CPU_GOALS.get(row["figure"], "")), row["detail"]]
        for row in found
    )
    return f"{where(found)}\n\n" + table(["figure", "measured", "goal", "detail"], body)


def training_table() -> str:
    """Ratios of training speed."""
    found = rows_of("cpu_train.csv")
    body = (
        [row["figure"].removeprefix("training speed, "), value(row),
         f"{detail(row, r'goal at least ([0-9.]+)'):g}"]
        for row in found if row["figure"].startswith("training speed")
    )  # fmt: skip
    return f"{where(found)}\n\n" + table(["clean tokens/s", "ratio", "goal"], body)


def decoding_table() -> str:
    """Tokens/s over AR, and what as many passes allow."""
    found = rows_of("cpu_decode.csv")
    body = (
        [row["figure"].removeprefix("tokens/s, "), value(row), f"{of[2]:.2f}"]
        for row in found if (of := decoding(row)) is not None
    )  # fmt: skip
    head = ["tokens/s", "ratio", "if a pass cost what AR's does"]
    return f"{where(found)}\n\n" + table(head, body)


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


def detail(row: dict[str, str], pattern: str) -> float:
    """The number that `pattern` finds in a row's details.

    Raises:
        ValueError: there is none.
    """
    found = re.search(pattern, row["detail"])
    if found is None:
        raise ValueError(f"no {pattern!r} in the details of {row['figure']!r}: {row['detail']!r}")
    return float(found[1])


def rates(row: dict[str, str]) -> tuple[float, float]:
    """GFLOP/s of our tiles and of dense SDPA over seen pairs: 4 D a pair forward, 10 D backward."""
    sizes = {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", row["figure"])}
    pairs = sizes["B"] * sizes["H"] * detail(row, r"density ([\d.]+)") * sizes["2L"] ** 2
    flops = pairs * sizes["D"] * (14 if row["figure"].startswith("forward+backward") else 4)
    ours, dense = detail(row, r"tiles ([\d.]+) ms"), detail(row, r"mask ([\d.]+) ms")
    return flops / ours / 1e6, flops / dense / 1e6


def decoding(row: dict[str, str]) -> tuple[int, int, float] | None:
    """(batch, k, ratio if each of its S/k + 1 passes a block cost one of AR's) of a speed's row."""
    named = re.fullmatch(r"tokens/s, block at k=(\d+) over AR, B=(\d+)", row["figure"])
    if named is None:
        return None
    k, slots = int(named[1]), detail(row, r"S=(\d+)")
    return int(named[2]), k, slots / (slots / k + 1)


def outputs() -> dict[Path, str]:
    """Every file, with what it should hold."""
    from benchmarks.performance_figures import DRAWN

    page = PAGE.read_text()
    sections = {
        "cpu": cpu_table(), "training": training_table(), "decoding": decoding_table(),
        "gpu": gpu_table(), "compiled": compiled_table(),
    }  # fmt: skip
    for name, text in sections.items():
        begin = BEGIN.format(name=name)
        if page.count(begin) != 1:
            raise SystemExit(f"{PAGE} must hold the line {begin} once, and {END} behind it")
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(END)
        page = f"{before}{begin}\n{text}\n{END}{after}"
    return {PAGE: page} | {FIGURES / f"{name}.svg": draw() for name, draw in DRAWN.items()}


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
