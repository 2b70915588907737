"""Labels of the points of a plot, moved where they do not cover each other and, if possible, no curve."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

_GAPS = (5.0, 11.0, 19.0)  # points between a marker and its label, near ones first
_SIDES = (("left", 1), ("right", 1), ("left", -1), ("right", -1), ("center", 1), ("center", -1))  # 1: above
_SHIFT = {"left": 4.0, "right": -4.0, "center": 0.0}
_ON_A_CURVE = 0.5  # cost of a curve behind a label; another label, or an end outside the axes, costs 1

_Choice = tuple[float, int, Bbox, tuple[str, int, float]]


def place_labels(axes: Axes, placed: Sequence[Annotation]) -> None:
    """Move each annotation, which has its offset in points, to a free side of its point.

    Call it when limits and scales of the axes are final.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout moves the axes
    pixels = figure.dpi / 72
    curves = _samples(axes)
    inside = axes.get_window_extent()
    taken: list[Bbox] = []
    for text in placed:
        x, y = axes.transData.transform(text.xy)
        size = text.get_window_extent()
        choices: list[_Choice] = []
        for gap, (side, up) in itertools.product(_GAPS, _SIDES):
            left = {"left": 0.0, "right": size.width, "center": size.width / 2}[side]
            corner = x + _SHIFT[side] * pixels - left, y + up * gap * pixels - (size.height if up < 0 else 0)
            box = Bbox.from_bounds(*corner, size.width, size.height)
            choices.append((_cost(box, taken, curves, inside), len(choices), box, (side, up, gap)))
        _, _, box, (side, up, gap) = min(choices)
        taken.append(box)
        text.set(ha=side, va="bottom" if up > 0 else "top", position=(_SHIFT[side], up * gap))


def _samples(axes: Axes) -> NDArray[np.float64]:
    """Places on the lines of the axes, in pixels."""
    pieces = [np.empty((0, 2))]
    for line in axes.get_lines():
        corners = line.get_transform().transform(line.get_xydata())
        pieces += [np.linspace(a, b, 200) for a, b in itertools.pairwise(corners)] or [corners]
    return np.concatenate(pieces)


def _cost(box: Bbox, taken: Sequence[Bbox], curves: NDArray[np.float64], inside: Bbox) -> float:
    overlaps = sum(bool(box.overlaps(other)) for other in taken)
    outside = bool(box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1)
    low, high = np.asarray(box.min), np.asarray(box.max)
    covered = bool(((curves > low - 2) & (curves < high + 2)).all(axis=1).any())
    return overlaps + outside + _ON_A_CURVE * covered
