"""The figures of docs/performance.md as SVG; the same CSV files give the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from abf.report.svg import INK, PALETTE, Style, svg_text
from benchmarks.performance import CPU_GOALS, decoding, detail, rates, rows_of

GEMM = {"fp32": 100.0, "bf16": 475.0}
"""GFLOP/s of large matrix products on one core of the machine of the committed rows: MKL's sgemm
(README.md of block_attention), oneDNN's bfloat16 in training (docs/results.md). Of other runs; rows
"share of matrix-product rate" of newer files have the rate of their own."""


def cpu_attention() -> str:
    """Left: times dense SDPA, with what seen and computed pairs allow; right: GFLOP/s."""
    found = rows_of("cpu_attention.csv")
    rows = [row for row in found if row["figure"].startswith("forward")]
    products = GEMM | {
        row["figure"].split(", ")[2]: detail(row, r"([\d.]+) GFLOP/s")
        for row in found
        if row["figure"].startswith("share of matrix-product rate")
    }
    kinds = [row["figure"].split(", ")[1] for row in rows]
    places = np.arange(len(rows))[::-1]
    allowed = np.array([1 / detail(row, r"density ([\d.]+)") for row in rows])
    computed = allowed / [detail(row, r"waste ([\d.]+)") for row in rows]
    with Style() as plt:
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
        _bars(left, rows)
        for values, colour, label in (
            (allowed, PALETTE[1], "all pairs / seen"),
            (computed, PALETTE[2], "all pairs / computed"),
            ([CPU_GOALS.get(row["figure"], np.nan) for row in rows], PALETTE[3], "goal"),
        ):
            left.plot(values, places, "|", color=colour, ms=13, mew=2, label=label)
        left.set_yticks(places, [_short(row["figure"]) for row in rows])
        left.set_xlabel("times dense-mask SDPA (95 % interval)")
        ours, dense = zip(*map(rates, rows), strict=True)
        right.barh(places + 0.17, ours, 0.34, color=PALETTE[0], label="tiles")
        right.barh(places - 0.17, dense, 0.34, color=PALETTE[4], label="dense SDPA")
        marks = [products[kind] for kind in kinds]
        right.plot(marks, places, "|", color=PALETTE[1], ms=13, mew=2, label="matrix products")
        right.set_xlabel("GFLOP/s over seen pairs, one core")
        for axes in (left, right):
            axes.grid(axis="y", visible=False)
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8)
        figure.tight_layout()
        return svg_text(figure)


def cpu_training() -> str:
    """Ratios of training speed, and their goals."""
    rows = [row for row in rows_of("cpu_train.csv") if row["figure"].startswith("training speed")]
    places = np.arange(len(rows))[::-1]
    with Style() as plt:
        figure, axes = plt.subplots(figsize=(7, 3.2))
        _bars(axes, rows)
        goals = [detail(row, r"goal at least ([\d.]+)") for row in rows]
        axes.plot(goals, places, "|", color=PALETTE[3], ms=13, mew=2, label="goal")
        axes.set_yticks(places, [r["figure"].removeprefix("training speed, ") for r in rows])
        axes.set_xlabel("ratio of clean tokens/s, one core (95 % interval)")
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower right")
        return svg_text(figure)


def _bars(axes: Any, rows: Sequence[dict[str, str]]) -> None:
    """A bar a row from the top, with its interval."""
    places = np.arange(len(rows))[::-1]
    value, low, high = ([float(row[name]) for row in rows] for name in ("value", "low", "high"))
    axes.barh(places, value, 0.6, color=PALETTE[0])
    axes.hlines(places, low, high, color=INK, lw=1.2)
    axes.axvline(1, color=INK, lw=0.8)


def cpu_decoding() -> str:
    """Tokens/s over AR by tokens committed a step, and what passes as cheap as AR's would give."""
    found: dict[int, list[tuple[float, ...]]] = {}
    limits: dict[int, float] = {}
    for row in rows_of("cpu_decode.csv"):
        if (of := decoding(row)) is not None:
            batch, k, limits[k] = of
            values = [float(row[name]) for name in ("value", "low", "high")]
            found.setdefault(batch, []).append((k, *values))
    with Style() as plt:
        figure, axes = plt.subplots(figsize=(5, 3.3))
        for (batch, points), colour in zip(sorted(found.items()), PALETTE, strict=False):
            k, value, low, high = (np.array(x) for x in zip(*sorted(points), strict=True))
            axes.plot(k, value, color=colour, marker="o", ms=4, label=f"batch {batch}")
            axes.vlines(k, low, high, color=colour)
        most = sorted(limits)
        axes.plot(
            most, [limits[k] for k in most], "--", color=INK, lw=1,
            label="limit: a pass as cheap as AR's",
        )  # fmt: skip
        axes.axhline(1, color=INK, lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(most, [str(k) for k in most])
        axes.set_yticks([0.25, 0.5, 1, 2, 4, 8, 16], ["0.25", "0.5", "1", "2", "4", "8", "16"])
        axes.set_xlabel("tokens committed a step, k")
        axes.set_ylabel("tokens/s over AR (95 % interval)")
        axes.legend(loc="upper left")
        return svg_text(figure)


def _short(name: str) -> str:
    step, kind, shape = name.split(", ", 2)
    step = step.replace("forward+backward", "both")
    return f"{kind} {step}, {shape.replace('B=', '').replace(' H=', 'x')}"


DRAWN: dict[str, Callable[[], str]] = {
    "attention_speed": cpu_attention,
    "training_speed": cpu_training,
    "decoding_speed": cpu_decoding,
}
