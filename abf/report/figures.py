"""SVG figures, one question each; deterministic, colour-blind safe, with units on the axes.

Every function returns the text of an SVG document. `inline` turns it into a fragment for the page
whose colours follow the page's light or dark scheme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from abf.report.metrics import BOUND, describe
from abf.report.tables import Estimate, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6a00", "#6a51a3")
"""Okabe and Ito's colours without yellow and black, then two more that stay apart."""
DARK_PALETTE = (
    "#4aa8e0",
    "#f08a4b",
    "#2fc79a",
    "#e3a3ca",
    "#f0b840",
    "#8ccff5",
    "#b8a53a",
    "#a894e8",
)
"""The same hues, light enough for a dark page."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, PAPER, FAINT = "#1f2328", "#fffffe", "#8c959f"
"""Text and axes, background, grid: replaced by the page's own colours when inlined."""
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Arial, sans-serif"

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "abf",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def colours(arms: Sequence[str]) -> dict[str, str]:
    """Arm -> colour, the same in every figure."""
    return {arm: PALETTE[i % len(PALETTE)] for i, arm in enumerate(arms)}


def bits_figure(
    rows: Mapping[str, Sequence[Estimate]], arms: Sequence[str], *, base: float | None
) -> str:
    """How well does each arm model held-out text?

    Args:
        rows: metric -> estimates, one panel each (bits per byte).
        arms: order from top to bottom.
        base: the base model's figure, drawn where it can be compared.
    """
    paint = colours(arms)
    with _Style() as plt:
        count = max(len(rows), 1)
        figure, axes = plt.subplots(
            1, count, figsize=(9.2, 1.25 + 0.42 * len(arms)), sharey=True, squeeze=False
        )
        for axis, (metric, found) in zip(axes[0], rows.items(), strict=False):
            for estimate in found:
                if estimate.mean is None:
                    continue
                y, colour = arms.index(estimate.arm), paint[estimate.arm]
                values = list(estimate.values.values())
                axis.plot(values, [y + 0.27] * len(values), "o", ms=3.5, color=colour, mew=0)
                _bar(axis, estimate.over_documents, y, colour, width=1.2, alpha=1)
                _bar(axis, estimate.over_seeds, y, colour, width=7.0, alpha=0.45)
                axis.plot([estimate.mean], [y], "|", ms=13, mew=2, color=colour)
            if base is not None and metric != BOUND:
                axis.axvline(base, color=INK, lw=1, ls=":")
                axis.annotate(
                    "base", (base, 1), xycoords=("data", "axes fraction"), xytext=(3, -9),
                    textcoords="offset points", fontsize=8,
                )  # fmt: skip
            axis.set_title(describe(metric).label)
            axis.set_xlabel("bits per byte")
            axis.locator_params(axis="x", nbins=5)
            axis.grid(axis="y", visible=False)
        axes[0][0].set_yticks(range(len(arms)), arms)
        axes[0][0].set_ylim(len(arms) - 0.5, -0.5)
        return _svg(figure)


def _bar(
    axis: Axes, interval: Interval | None, y: float, colour: str, *, width: float, alpha: float
) -> None:
    if interval is not None:
        axis.plot(interval, [y, y], color=colour, lw=width, alpha=alpha, solid_capstyle="butt")


def parallelism_figure(
    pairs: Sequence[tuple[Estimate, Estimate]], arms: Sequence[str], decoders: Sequence[str]
) -> str:
    """What does generating more tokens per forward pass cost in quality?

    Args:
        pairs: (tokens per forward, bits per byte under the base model) of one arm and decoder.
        arms: order of the colours.
        decoders: order of the markers.
    """
    paint = colours(arms)
    with _Style() as plt:
        figure, axis = plt.subplots(figsize=(7.4, 4.3))
        for arm in arms:
            points = [
                (x.mean, y.mean, x, y)
                for x, y in pairs
                if x.arm == arm and x.mean is not None and y.mean is not None
            ]
            points.sort(key=lambda point: point[:2])
            axis.plot(
                [p[0] for p in points], [p[1] for p in points], color=paint[arm], lw=1, alpha=0.6
            )
            for x_mean, y_mean, x, y in points:
                marker = MARKERS[decoders.index(x.key.decoder) % len(MARKERS)]
                seeds = sorted(x.values.keys() & y.values.keys())
                axis.errorbar(
                    x_mean,
                    y_mean,
                    xerr=_arms_of_bar(x_mean, x.over_seeds or x.over_documents),
                    yerr=_arms_of_bar(y_mean, y.over_seeds or y.over_documents),
                    fmt="none",
                    ecolor=paint[arm],
                    elinewidth=0.9,
                    alpha=0.45,
                )
                style = {"color": paint[arm], "marker": marker, "ls": "", "mew": 0}
                axis.plot(
                    [x.values[seed] for seed in seeds],
                    [y.values[seed] for seed in seeds],
                    ms=3,
                    alpha=0.6,
                    **style,
                )
                axis.plot([x_mean], [y_mean], ms=7, **style)
        # With two or three seeds t intervals are so wide that they would squash everything else.
        axis.set_xlim(*_span([x for x, _ in pairs]))
        axis.set_ylim(*_span([y for _, y in pairs]))
        axis.set_xlabel("tokens per forward pass (more is faster)")
        axis.set_ylabel(
            "bits per byte of the generated text\nunder the base model (less is better)"
        )
        arm_keys = [
            plt.Line2D([], [], color=paint[arm], marker="o", ls="", ms=6, label=arm) for arm in arms
        ]
        decoder_keys = [
            plt.Line2D([], [], color=INK, marker=MARKERS[i % len(MARKERS)], ls="", ms=6, label=name)
            for i, name in enumerate(decoders)
        ]
        place = {"loc": "upper left", "alignment": "left", "borderaxespad": 0}
        first = axis.legend(handles=arm_keys, title="arm", bbox_to_anchor=(1.02, 1), **place)
        axis.add_artist(first)
        axis.legend(handles=decoder_keys, title="decoder", bbox_to_anchor=(1.02, 0.5), **place)
        return _svg(figure)


def _span(shown: Sequence[Estimate]) -> tuple[float, float]:
    """Range that holds every single seed and every interval over documents."""
    ends = [value for estimate in shown for value in estimate.values.values()]
    ends += [end for estimate in shown for end in estimate.over_documents or ()]
    margin = 0.06 * (max(ends) - min(ends)) or 0.1
    return min(ends) - margin, max(ends) + margin


def _arms_of_bar(mean: float, interval: Interval | None) -> NDArray[np.float64] | None:
    if interval is None:
        return None
    return np.clip([[mean - interval.low], [interval.high - mean]], 0, None)


Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Clean tokens, value."""


def training_figure(
    panels: Mapping[str, Mapping[str, Mapping[int, Curve]]], arms: Sequence[str]
) -> str:
    """Does every arm train, and equally steadily over seeds?

    Args:
        panels: panel title with unit -> arm -> seed -> curve.
        arms: order of the colours.
    """
    paint = colours(arms)
    with _Style() as plt:
        count = max(len(panels), 1)
        figure, axes = plt.subplots(1, count, figsize=(9.2, 3.4), squeeze=False)
        for axis, (title, by_arm) in zip(axes[0], panels.items(), strict=False):
            ends = []
            for arm in arms:
                by_seed = by_arm.get(arm, {})
                for tokens, values in by_seed.values():
                    axis.plot(tokens, values, color=paint[arm], lw=0.7, alpha=0.45)
                    ends.append(values)
                mean = _mean_curve(list(by_seed.values()))
                if mean is not None:
                    axis.plot(*mean, color=paint[arm], lw=1.8, label=arm)
            _cut_the_start(axis, ends)
            axis.set_title(title)
            axis.set_xlabel("clean tokens")
            axis.xaxis.set_major_formatter(plt.FuncFormatter(_short_number))
            axis.locator_params(axis="x", nbins=5)
        axes[0][0].set_ylabel("nats per token")
        handles = [plt.Line2D([], [], color=paint[arm], lw=1.8, label=arm) for arm in arms]
        axes[0][-1].legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return _svg(figure)


def _cut_the_start(axis: Axes, curves: Sequence[NDArray[np.float64]]) -> None:
    """The first values dwarf everything else: show the range of the rest, and the fall into it."""
    rest = np.concatenate([curve[len(curve) // 10 :] for curve in curves])
    low, high = float(rest.min()), float(rest.max())
    margin = 0.05 * (high - low) or 0.1
    axis.set_ylim(low - margin, high + margin)


def _mean_curve(curves: Sequence[Curve]) -> Curve | None:
    """Mean over seeds at the tokens they share."""
    if not curves:
        return None
    tokens = curves[0][0]
    for other, _ in curves[1:]:
        tokens = np.intersect1d(tokens, other)
    if not len(tokens):
        return None
    values = [value[np.searchsorted(own, tokens)] for own, value in curves]
    return tokens, np.mean(values, axis=0)


def _short_number(value: float, position: int | None = None) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def block_length_figure(lengths: Mapping[str, NDArray[np.int64]], arms: Sequence[str]) -> str:
    """How long are the blocks of each arm?

    Args:
        lengths: arm -> [blocks] tokens; arms that know no blocks are missing.
        arms: all arms, in the order of the colours.
    """
    paint = colours(arms)
    arms = [arm for arm in arms if arm in lengths]
    longest = max((int(found.max()) for found in lengths.values() if len(found)), default=1)
    with _Style() as plt:
        figure, axes = plt.subplots(
            len(arms), 1, figsize=(7.4, 0.7 + 1.15 * len(arms)), sharex=True, squeeze=False
        )
        for axis, arm in zip(axes[:, 0], arms, strict=True):
            found = lengths[arm]
            share = np.bincount(found, minlength=longest + 1)[1:] / max(len(found), 1)
            axis.bar(np.arange(1, longest + 1), 100 * share, width=0.86, color=paint[arm])
            if len(found):
                text = (
                    f"{arm}: mean {found.mean():.1f}, median {np.median(found):g}, "
                    f"longest {found.max()} tokens; {len(found):,} blocks"
                )
                axis.set_title(text, fontweight="normal")
            axis.grid(axis="x", visible=False)
            axis.locator_params(axis="y", nbins=3)
            axis.set_xlim(0.2, longest + 0.8)
        axes[len(arms) // 2][0].set_ylabel("share of blocks (%)")
        axes[-1][0].set_xlabel("tokens per block")
        figure.subplots_adjust(hspace=0.55)
        return _svg(figure)


# --- SVG ----------------------------------------------------------------------------------------


class _Style:
    """Our settings of matplotlib, without a display, for the length of a `with`."""

    def __enter__(self) -> Any:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        self._context = plt.rc_context(_STYLE)
        self._context.__enter__()
        return plt

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def _svg(figure: Figure) -> str:
    import matplotlib.pyplot as plt

    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", bbox_inches="tight", pad_inches=0.06, metadata=nothing)
    plt.close(figure)
    # The page's own fonts, so that text looks the same in and outside figures.
    return re.sub(r"font-family: [^;\"]*", f"font-family: {FONT}", stream.getvalue())


def inline(svg: str, name: str) -> str:
    """An SVG document as a fragment of the page.

    Ids get the figure's name in front (a page has many figures), width and height are dropped so
    that it scales, and colours become the page's variables.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    width = re.search(r'<svg[^>]* width="([0-9.]+)pt"', svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    for colour, variable in ((INK, "ink"), (PAPER, "paper"), (FAINT, "faint")):
        svg = svg.replace(colour, f"var(--{variable})")
    for index, colour in enumerate(PALETTE):
        svg = svg.replace(colour, f"var(--c{index})")
    size = f"{float(width.group(1)) * 4 / 3:.0f}px" if width else "100%"
    return svg.replace("<svg", f'<svg role="img" style="width:100%;max-width:{size}"', 1)
