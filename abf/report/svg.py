"""Look of the figures, and SVG text that stands alone or takes on the colours of the page."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


class Style:
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


def svg_text(figure: Figure) -> str:
    """SVG document of a figure, which is closed; the same figure gives the same bytes."""
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
