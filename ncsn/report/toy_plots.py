"""The paper's Figures 2 and 3: score fields, and where two samplers end. Plain arrays in, a matplotlib figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ncsn.report.style import INK, PALETTE, new_figure, styled

Array = NDArray[np.float64]

LIMIT = 8.0
"""The figures show [-8, 8]^2."""
_DENSITY = LinearSegmentedColormap.from_list(
    "density", [(*to_rgb(PALETTE[1]), 0.0), (*to_rgb(PALETTE[1]), 0.45), (*to_rgb(PALETTE[1]), 0.9)]
)


@dataclass(frozen=True)
class ModeSample:
    """Where one sampler's points ended.

    Attributes:
        title: Name of the sampler.
        points: [N, 2].
        weight: Share of them at the mode (5, 5).
    """

    title: str
    points: Array
    weight: float


@styled
def score_fields(
    positions: Array, fields: Mapping[str, Array], *, density: Array, trusted: Sequence[tuple[float, float, float]]
) -> Figure:
    """Figure 2: fields of scores as arrows over the density, darker where it is higher.

    Args:
        positions: [G, G, 2], x along the second axis, y along the first, ascending.
        fields: Title -> [G, G, 2] scores at the positions.
        density: [M, M] over [-8, 8]^2, y ascending along the first axis.
        trusted: (x, y, half side) of the squares in which the fields agree.
    """
    figure = new_figure(3.5 * len(fields), 3.7)
    for axes, (title, field) in zip(_square_axes(figure, len(fields)), fields.items(), strict=True):
        axes.imshow(
            density, extent=(-LIMIT, LIMIT, -LIMIT, LIMIT), origin="lower", cmap=_DENSITY, interpolation="bilinear"
        )
        x, y, u, v = positions[..., 0], positions[..., 1], field[..., 0], field[..., 1]
        axes.quiver(x, y, u, v, color=PALETTE[0], angles="xy", scale_units="xy", scale=9, width=0.004)
        for left, bottom, half in trusted:
            corner = (left - half, bottom - half)
            axes.add_patch(Rectangle(corner, 2 * half, 2 * half, fill=False, edgecolor="#d03030", linewidth=1.4))
        axes.set_title(title)
    return figure


@styled
def mode_samples(rows: Sequence[Sequence[ModeSample]], *, truth: float) -> Figure:
    """Figure 3: points of several samplers, with the share of them at the mode (5, 5).

    Args:
        rows: Rows of samplers.
        truth: The share that is right.
    """
    columns = max(len(row) for row in rows)
    figure = new_figure(2.6 * columns, 2.95 * len(rows))
    all_axes = _square_axes(figure, columns, len(rows))
    for number, axes in enumerate(all_axes):
        row, column = divmod(number, columns)
        if column >= len(rows[row]):
            axes.set_axis_off()
            all_axes[number - columns].tick_params(labelbottom=True)
            continue
        sample = rows[row][column]
        axes.plot(
            *sample.points.T, ".", color=PALETTE[1], markersize=2.2, markeredgewidth=0, alpha=0.7, rasterized=True
        )
        for place, height, share in ((-5.0, -1.2, 1 - sample.weight), (5.0, 1.2, sample.weight)):
            axes.annotate(f"{share:.2f}", (place, height), ha="center", va="center", fontsize=10)
        axes.set_title(sample.title)
    figure.supxlabel(f"shares of the points; the mixture has {1 - truth:.2f} and {truth:.2f}", color=INK, fontsize=8)
    return figure


def _square_axes(figure: Figure, columns: int, rows: int = 1) -> list[Axes]:
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat:
        axes.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", xticks=[-5, 0, 5], yticks=[-5, 0, 5])
        axes.grid(visible=False)
    return list(grid.flat)
