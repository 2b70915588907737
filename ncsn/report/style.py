"""The one look of all plots, and their files.

A plot has no background, its ink is a grey and its colours have a middle lightness, so that it can be read on a light
and on a dark page alike. In an SVG the ink becomes `currentColor`: there it takes the colour of the text around it.
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
"""Of text, axes and reference lines."""
# At least 3:1 contrast on white and near-black.
PALETTE = ("#2f7fc4", "#cf5f1d", "#16876a", "#b4519b", "#8467d7", "#8d7a1f")
"""Of series that are told apart by name, in this order."""
LEVEL_COLOURS = LinearSegmentedColormap.from_list("ncsn-levels", ["#2b7bba", "#7b6bd6", "#bd4f93", "#d0561c"])
"""Of noise levels and other ordered numbers."""
HEAT = "viridis"
"""Of areas, which need no contrast with the page."""
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
    """Draw a plot in this module's look, whatever matplotlib's settings are outside."""

    @functools.wraps(plot)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with rc_context(_STYLE):
            return plot(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, of which a page shows about 100 pixels each."""
    return Figure(figsize=(width, height), layout="constrained")


def bare(axes: Axes) -> Axes:
    """Take ticks, frame and grid from axes that show pictures."""
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return axes


def to_png(figure: Figure) -> bytes:
    """A PNG file without a background. The same figure gives the same bytes."""
    buffer = io.BytesIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def to_svg(figure: Figure, *, salt: str = "ncsn") -> str:
    """An `<svg>` element, which stands inside a page or as a file of its own. The same figure gives the same text.

    Args:
        figure: The plot.
        salt: What the element's ids are made from; give each of several plots in one page its own.
    """
    buffer = io.StringIO()
    with rc_context({**_STYLE, "svg.fonttype": "none", "svg.hashsalt": salt}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=metadata)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
