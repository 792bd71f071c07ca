"""SVG figures, one question each; deterministic, colour-blind safe, with units on the axes.

Every function returns the text of an SVG document; `svg.inline` makes a fragment of the page of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from abf.report.curves import Curve
from abf.report.intervals import Interval
from abf.report.metrics import BOUND, describe
from abf.report.svg import INK, PALETTE, Style, svg_text
from abf.report.tables import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def colours(arms: Sequence[str]) -> dict[str, str]:
    """Arm -> colour, the same in every figure."""
    return {arm: PALETTE[i % len(PALETTE)] for i, arm in enumerate(arms)}


def bits_figure(
    rows: Mapping[str, Sequence[Estimate]], arms: Sequence[str], *, base: Sequence[float]
) -> str:
    """How well does each arm model held-out text?

    Args:
        rows: metric -> estimates, one panel each (bits per byte).
        arms: order from top to bottom.
        base: figures of the base models, drawn where they can be compared.
    """
    paint = colours(arms)
    with Style() as plt:
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
            if metric != BOUND:
                _levels(axis, base)
            axis.set_title(describe(metric).label)
            axis.set_xlabel(f"bits per byte{'; cuts free, so no base' if metric == BOUND else ''}")
            axis.locator_params(axis="x", nbins=5)
            axis.grid(axis="y", visible=False)
        axes[0][0].set_yticks(range(len(arms)), arms)
        axes[0][0].set_ylim(len(arms) - 0.5, -0.5)
        return svg_text(figure)


def _levels(axis: Axes, levels: Sequence[float], *, upright: bool = True) -> None:
    """Dotted lines where the base models are."""
    for level in levels:
        draw = axis.axvline if upright else axis.axhline
        draw(level, color=INK, lw=1, ls=":")
        at, where = ((level, 1), ("data", "axes fraction"))
        if not upright:
            at, where = ((0, level), ("axes fraction", "data"))
        axis.annotate(
            "base", at, xycoords=where, xytext=(3, -9 if upright else 3),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip


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
    with Style() as plt:
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
        return svg_text(figure)


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


def training_figure(
    panels: Mapping[str, Mapping[str, Mapping[int, Curve]]],
    arms: Sequence[str],
    *,
    levels: Mapping[str, Sequence[float]],
) -> str:
    """Does every arm train, and equally steadily over seeds?

    Args:
        panels: panel title -> arm -> seed -> curve, nats per token.
        arms: order of the colours.
        levels: panel title -> what the base models had reached.
    """
    paint = colours(arms)
    with Style() as plt:
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
            known = levels.get(title, ())
            _cut_the_start(axis, ends, known)
            _levels(axis, known, upright=False)
            axis.set_title(title)
            axis.set_xlabel("clean tokens")
            axis.xaxis.set_major_formatter(plt.FuncFormatter(_short_number))
            axis.locator_params(axis="x", nbins=5)
        axes[0][0].set_ylabel("nats per token")
        handles = [plt.Line2D([], [], color=paint[arm], lw=1.8, label=arm) for arm in arms]
        axes[0][-1].legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return svg_text(figure)


def _cut_the_start(
    axis: Axes, curves: Sequence[NDArray[np.float64]], levels: Sequence[float]
) -> None:
    """The first values dwarf everything else: show the range of the rest, and the fall into it."""
    rest = np.concatenate([*(curve[len(curve) // 10 :] for curve in curves), levels])
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
    with Style() as plt:
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
        return svg_text(figure)
