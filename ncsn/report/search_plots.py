"""Plots of a search over settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ncsn.report.plots import log_scale_where_positive
from ncsn.report.style import INK, LEVEL_COLOURS, PALETTE, bare, new_figure, styled

LOGARITHMIC = 30.0
"""Numbers that spread over more than this factor are laid out by their logarithm."""


@styled
def epsilon_versus_quality(
    epsilon: Sequence[float], quality: Sequence[float], *, quality_label: str, chosen: float | None = None
) -> Figure:
    """The figure of merit over the step size of Langevin dynamics.

    Args:
        epsilon: [P] step sizes.
        quality: [P]; NaN, of a chain that diverged, is marked at the upper edge.
        quality_label: Name of the figure with extractor and sample count.
        chosen: The epsilon that was chosen.
    """
    figure = new_figure(7, 3.4)
    axes = figure.subplots()
    x, y = np.asarray(epsilon, np.float64), np.asarray(quality, np.float64)
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    finite = np.isfinite(y)
    axes.plot(x[finite], y[finite], "o-", color=PALETTE[0], markersize=5)
    if not finite.all():
        top = axes.get_xaxis_transform()
        axes.plot(x[~finite], np.full((~finite).sum(), 0.97), "x", color=PALETTE[1], transform=top, label="diverged")
    if chosen is not None:
        axes.axvline(chosen, color=PALETTE[2], linestyle="--", linewidth=1.2, label=f"chosen: {chosen:.3g}")
    axes.set(xlabel="epsilon (step size at the last level, squared pixels)", ylabel=quality_label, xscale="log")
    log_scale_where_positive(axes, y[finite])
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper left", ncols=2)
    return figure


@styled
def search_coordinates(
    settings: Mapping[str, Sequence[Any]], quality: Sequence[float], *, quality_label: str, lower_is_better: bool = True
) -> Figure:
    """A search in parallel coordinates: one line per trial through its settings to its figure of merit.

    Args:
        settings: Dotted path -> the value in each trial [P], numbers or words. Numbers that spread over more than a
            factor of 30 are laid out by their logarithm.
        quality: [P]; trials without a finite one are drawn thin.
        quality_label: Name of the figure.
        lower_is_better: Which end of it is the best trial's, drawn thickest.
    """
    scores = np.asarray(quality, np.float64)
    columns = [*(_Column.of(name, values) for name, values in settings.items()), _Column.of(quality_label, scores)]
    figure = new_figure(max(5.0, 1.7 * len(columns)), 3.8)
    axes = figure.subplots()
    finite = np.isfinite(scores)
    norm = (
        Normalize(*(columns[-1].positions[finite].min(), columns[-1].positions[finite].max())) if finite.any() else None
    )
    best = int(np.nanargmin(scores if lower_is_better else -scores)) if finite.any() else -1
    for trial in np.argsort(np.where(finite, -scores if lower_is_better else scores, -math.inf), kind="stable"):
        heights = [column.positions[trial] for column in columns if np.isfinite(column.positions[trial])]
        colour = LEVEL_COLOURS(norm(heights[-1])) if norm is not None and finite[trial] else INK
        width = 3.0 if trial == best else 1.2 if finite[trial] else 0.6
        axes.plot(range(len(heights)), heights, color=colour, linewidth=width, alpha=1 if trial == best else 0.75)
    _draw_columns(axes, columns)
    return figure


@dataclass(frozen=True)
class _Column:
    """One axis of parallel coordinates.

    Attributes:
        name: Its title.
        positions: Height of each trial's value, 0 to 1; NaN if it has none.
        ticks: Height and text of what is written beside the axis.
    """

    name: str
    positions: NDArray[np.float64]
    ticks: list[tuple[float, str]]

    @classmethod
    def of(cls, name: str, values: Sequence[Any] | NDArray[np.float64]) -> _Column:
        if all(_is_number(value) for value in values):
            return cls._of_numbers(name, np.array(values, np.float64))
        words = sorted({str(value) for value in values})
        places = {word: index / (len(words) - 1) if len(words) > 1 else 0.5 for index, word in enumerate(words)}
        return cls(
            name, np.array([places[str(value)] for value in values]), [(at, word) for word, at in places.items()]
        )

    @classmethod
    def _of_numbers(cls, name: str, values: NDArray[np.float64]) -> _Column:
        finite = values[np.isfinite(values)]
        if not len(finite):
            return cls(name, np.full(len(values), math.nan), [])
        low, high = float(finite.min()), float(finite.max())
        if low == high:
            return cls(name, np.where(np.isfinite(values), 0.5, math.nan), [(0.5, f"{low:.3g}")])
        logarithmic = low > 0 and high > LOGARITHMIC * low
        scaled, ends = (np.log(values), np.log([low, high])) if logarithmic else (values, np.array([low, high]))
        middle = math.sqrt(low * high) if logarithmic else (low + high) / 2
        ticks = [(0.0, f"{low:.3g}"), (0.5, f"{middle:.3g}"), (1.0, f"{high:.3g}")]
        return cls(name, (scaled - ends[0]) / (ends[1] - ends[0]), ticks)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _draw_columns(axes: Axes, columns: Sequence[_Column]) -> None:
    bare(axes)
    axes.set(xlim=(-0.3, len(columns) - 0.4), ylim=(-0.08, 1.16))
    for index, column in enumerate(columns):
        axes.axvline(index, ymin=0.06, ymax=0.875, color=INK, linewidth=0.8)
        section, _, setting = column.name.rpartition(".")
        axes.annotate(
            f"{section}\n{setting}" if section else setting, (index, 1.06), ha="center", va="bottom", fontsize=8
        )
        for height, text in column.ticks:
            axes.annotate(text, (index, height), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
