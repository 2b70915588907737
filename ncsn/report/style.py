"""The style of all plots, and their PNG and SVG files.

A plot has no background, its ink is gray and its colors have a middle lightness, so that it is readable on a light and
on a dark page. In an SVG the ink becomes `currentColor`, the color of the text around it.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any, ParamSpec

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

INK = "#6e6e6e"
# All colors have a contrast of at least 3:1 on white and on near-black.
PALETTE = ("#2f7fc4", "#cf5f1d", "#16876a", "#b4519b", "#8467d7", "#8d7a1f")
# Noise levels and other ordered numbers.
LEVEL_COLORS = LinearSegmentedColormap.from_list("ncsn-levels", ["#2b7bba", "#7b6bd6", "#bd4f93", "#d0561c"])
HEAT = "viridis"  # areas, which need no contrast with the page
DPI = 160

_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "figure.facecolor": "none",
    "font.family": ["sans-serif"],
    "font.size": 9,
    "grid.alpha": 0.25,
    "grid.color": INK,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "savefig.facecolor": "none",
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": 8,
    "ytick.color": INK,
    "ytick.labelsize": 8,
}

P = ParamSpec("P")


def styled(plot: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw a plot in this style, independent of matplotlib's global settings."""

    @functools.wraps(plot)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with rc_context(_STYLE):
            return plot(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches; the page shows an inch as about 100 pixels."""
    return Figure(figsize=(width, height), layout="constrained")


def bare(axes: Axes) -> Axes:
    """Remove ticks, frame and grid from axes that show pictures."""
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return axes


def to_png(figure: Figure) -> bytes:
    """A PNG file with a transparent background. The same figure gives the same bytes."""
    buffer = io.BytesIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def to_svg(figure: Figure, *, salt: str = "ncsn") -> str:
    """An `<svg>` element. The same figure gives the same text; plots of one page need different salts for their IDs."""
    buffer = io.StringIO()
    with rc_context({**_STYLE, "svg.fonttype": "none", "svg.hashsalt": salt}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=metadata)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
