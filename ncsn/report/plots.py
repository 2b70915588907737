"""Plots of curves and numbers: plain arrays in, a matplotlib figure out, and its PNG and SVG files.

A plot has no background, its ink is gray and its colors have a middle lightness, so that it is readable on a light and
on a dark page. In an SVG the ink becomes `currentColor`, the color of the text around it. On the page an inch has about
100 pixels.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter
from numpy.typing import ArrayLike, NDArray

from ncsn.report.words import arm_label
from ncsn.runs.metrics import Estimate
from ncsn.runs.results import UtilityResult

Array = NDArray[np.float64]

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


MOST_POINTS = 150  # of a curve; more are not visible and make the page large
MOST_CLASSES = 20  # with names beside the matrix
LOSS_LABEL = "normalized loss (1: predicting zero)"
SEEN_LABEL = "images seen"
SIGMA_LABEL = "sigma (pixels in [0, 1])"
LOGARITHMIC = 30.0  # numbers that spread over more than this factor are placed by their logarithm

styled = rc_context(_STYLE)  # a decorator: each call draws in this style, whatever matplotlib's global settings are


def bare(axes: Axes) -> Axes:
    """Remove ticks, frame and grid from axes that show pictures."""
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return axes


def to_png(figure: Figure) -> bytes:
    """A PNG file with a transparent background. The same figure gives the same bytes."""
    buffer = io.BytesIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a class: a box stands for the letter
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


@styled
def loss_curves(images_seen: ArrayLike, losses: ArrayLike, *, sigmas: ArrayLike) -> Figure:
    """One line per level, colored by sigma.

    `losses` are [P, L] at P >= 1 points, NaN where no image had that level; `sigmas` [L] descend.
    """
    seen, values = np.asarray(images_seen, np.float64), np.asarray(losses, np.float64)
    # At most `MOST_POINTS` points: each is the mean of neighboring points, at the last of them.
    parts = np.array_split(np.arange(len(seen)), min(len(seen), MOST_POINTS))
    finite = np.isfinite(values)
    sums = np.stack([np.where(finite, values, 0)[part].sum(axis=0) for part in parts])
    counts = np.stack([finite[part].sum(axis=0) for part in parts])
    values = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    seen = seen[[part[-1] for part in parts]]
    levels = np.asarray(sigmas, np.float64)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    norm = LogNorm(levels[-1], levels[0]) if levels[0] > levels[-1] else Normalize(levels[0] - 1, levels[0] + 1)
    for level, sigma in enumerate(levels):
        known = np.isfinite(values[:, level])
        marker = "o" if known.sum() == 1 else None
        color = LEVEL_COLORS(norm(sigma))
        axes.plot(seen[known], values[known, level], color=color, linewidth=1.1, marker=marker, markersize=3)
    axes.axhline(1, color=INK, linestyle="--", linewidth=0.8)
    axes.set(xlabel=SEEN_LABEL, ylabel=LOSS_LABEL, yscale="log", xlim=(0, None))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    bar = figure.colorbar(ScalarMappable(norm, LEVEL_COLORS), ax=axes, label=SIGMA_LABEL)
    bar.outline.set_visible(False)
    return figure


@styled
def held_out_losses(images_seen: ArrayLike, held_out: ArrayLike, training: ArrayLike) -> Figure:
    """Held-out and training loss [P] over training."""
    seen = np.asarray(images_seen, np.float64)
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, (name, losses) in enumerate((("training images", training), ("held-out images", held_out))):
        axes.plot(seen, np.asarray(losses), "o-", color=PALETTE[number], markersize=4, label=name)
    axes.set(xlabel=SEEN_LABEL, ylabel="mean normalized loss", xlim=(0, None))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _log_scale_where_positive(axes, np.concatenate([np.asarray(held_out), np.asarray(training)]))
    axes.legend(loc="best")
    return figure


def _log_scale_where_positive(axes: Axes, values: ArrayLike) -> None:
    """A logarithmic y axis if all values are positive and spread over more than a factor of 3."""
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    if len(finite) and finite.min() > 0 and finite.max() > 3 * finite.min():
        axes.set_yscale("log")
        # Without powers.
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        # Minor ticks at 2, 3 and 5 times a power of ten have labels; those of the others would be too close.
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else ""))


@styled
def confusion_matrix(classes: Mapping[str, Any]) -> Figure:
    """Shares of the images of each class, rows, that are classified as each class, columns."""
    counts, names = np.array(classes["confusion"], np.float64), [line["name"] for line in classes["table"]]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.3 * min(len(names), MOST_CLASSES)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = bare(figure.subplots())
    image = axes.imshow(shares, vmin=0, vmax=1, cmap=HEAT, interpolation="none")
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the images")
    axes.set(xlabel="predicted class", ylabel="requested class")
    if len(names) <= MOST_CLASSES:
        axes.set_xticks(range(len(names)), _short(names), rotation=60, ha="right", parse_math=False)
        axes.set_yticks(range(len(names)), _short(names), parse_math=False)
    return figure


def _short(names: Sequence[str]) -> list[str]:
    """Names of classes that have room beside an axis."""
    return [name if len(name) <= 14 else f"{name[:13]}…" for name in names]


@styled
def utility_figure(result: UtilityResult) -> Figure:
    """The result of `utility`: what each set of images reaches, and the recall of each class with and without."""
    arms = {arm.name: arm for arm in result.arms}
    names = [each.name for each in result.classes][:MOST_CLASSES]
    figure = Figure(figsize=(8.2, 0.9 + 0.28 * max(len(arms), len(names))), layout="constrained")
    left, right = figure.subplots(1, 2)

    def dots(axes: Axes, figures: Sequence[Estimate], *, shift: float = 0, **style: Any) -> None:
        values = [each.value for each in figures]
        reach = [[each.value - each.low for each in figures], [each.high - each.value for each in figures]]
        places = shift - np.arange(len(values))
        axes.errorbar(values, places, xerr=reach, fmt="o", markersize=4, linewidth=1.2, **style)

    dots(left, [arm.balanced_accuracy for arm in arms.values()], color=PALETTE[0])
    left.set(yticks=-np.arange(len(arms)), yticklabels=[*map(arm_label, arms)], title="balanced accuracy %")
    for name, color, shift in (("augmented", INK, 0.14), (result.chosen[0], PALETTE[1], -0.14)):
        dots(right, arms[name].recalls[: len(names)], shift=shift, color=color, label=arm_label(name))
    right.set_yticks(-np.arange(len(names)), _short(names), parse_math=False)
    right.set(title="recall by class %")
    figure.legend(loc="outside lower right", ncols=2)  # a free place inside counts no intervals
    for axes in (left, right):
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
    return figure


@styled
def selection_figure(rows: Sequence[Mapping[str, Any]], *, metric: str, chosen: Mapping[str, Any]) -> Figure:
    """The `metric` of each candidate over images seen.

    Bars are 95 % intervals, and a star marks the `chosen` row.
    """
    scored = [row for row in rows if row["value"] is not None]
    x, y, *ends = np.array([[row[name] for name in ("images_seen", "value", "low", "high")] for row in scored]).T
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(x, y, np.abs(ends - y), marker="o", markersize=4, capsize=2)
    best = chosen["images_seen"], chosen["value"]
    axes.plot(*best, marker="*", markersize=13, color=PALETTE[1], markeredgecolor=INK)
    axes.set(xlabel=SEEN_LABEL, ylabel=metric.removeprefix("eval/"))
    return figure


@styled
def epsilon_versus_quality(
    epsilon: Sequence[float], quality: Sequence[float], *, quality_label: str, chosen: float
) -> Figure:
    """Quality over the step size of Langevin dynamics; NaN, of a chain that diverged, is marked at the upper edge."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    x, y = np.asarray(epsilon, np.float64), np.asarray(quality, np.float64)
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    finite = np.isfinite(y)
    axes.plot(x[finite], y[finite], "o-", color=PALETTE[0], markersize=5)
    if not finite.all():
        top = axes.get_xaxis_transform()
        axes.plot(x[~finite], np.full((~finite).sum(), 0.97), "x", color=PALETTE[1], transform=top, label="diverged")
    axes.axvline(chosen, color=PALETTE[2], linestyle="--", linewidth=1.2, label=f"chosen: {chosen:.3g}")
    axes.set(xlabel="epsilon (step size at the last level, squared pixels)", ylabel=quality_label, xscale="log")
    _log_scale_where_positive(axes, y[finite])
    figure.legend(loc="outside upper left", ncols=2)
    return figure


# The height of each value, 0 to 1, NaN if it has none; and height and text of the ticks.
_Column = tuple[Array, list[tuple[float, str]]]


@styled
def search_coordinates(
    settings: Mapping[str, Sequence[Any]], quality: Sequence[float], *, quality_label: str
) -> Figure:
    """A search in parallel coordinates: one line per trial through its settings to its quality, where lower is better.

    `settings` are dotted path -> the value in each trial [P], numbers or words. Of the trials [P] those without a
    finite quality get a thin line, and the best one the thickest.
    """
    scores = np.asarray(quality, np.float64)
    names, columns = [*settings, quality_label], [*map(_column, settings.values()), _column(scores)]
    figure = Figure(figsize=(max(5.0, 1.7 * len(columns)), 3.8), layout="constrained")
    axes = figure.subplots()
    finite = np.isfinite(scores)
    heights_of_quality, _ = columns[-1]
    reached = heights_of_quality[finite]
    norm = Normalize(reached.min(), reached.max()) if finite.any() else None
    best = int(np.nanargmin(scores)) if finite.any() else -1
    for trial in np.argsort(np.where(finite, -scores, -math.inf), kind="stable"):
        heights = [places[trial] for places, _ in columns if np.isfinite(places[trial])]
        color = LEVEL_COLORS(norm(heights[-1])) if norm is not None and finite[trial] else INK
        width = 3.0 if trial == best else 1.2 if finite[trial] else 0.6
        axes.plot(range(len(heights)), heights, color=color, linewidth=width, alpha=1 if trial == best else 0.75)
    bare(axes)
    axes.set(xlim=(-0.3, len(columns) - 0.4), ylim=(-0.08, 1.16))
    for index, (name, (_, ticks)) in enumerate(zip(names, columns, strict=True)):
        axes.axvline(index, ymin=0.06, ymax=0.875, color=INK, linewidth=0.8)
        label = "\n".join(filter(None, name.rpartition(".")[::2]))
        axes.annotate(label, (index, 1.06), ha="center", va="bottom", fontsize=8)
        for height, text in ticks:
            axes.annotate(text, (index, height), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    return figure


def _column(values: Sequence[Any] | Array) -> _Column:
    """One axis of parallel coordinates."""
    if not all(isinstance(value, int | float | np.number) and not isinstance(value, bool) for value in values):
        words = sorted({str(value) for value in values})
        places = {word: index / (len(words) - 1) if len(words) > 1 else 0.5 for index, word in enumerate(words)}
        return np.array([places[str(value)] for value in values]), [(at, word) for word, at in places.items()]
    values = np.array(values, np.float64)
    finite = values[np.isfinite(values)]
    if not len(finite):
        return np.full(len(values), math.nan), []
    low, high = float(finite.min()), float(finite.max())
    if low == high:
        return np.where(np.isfinite(values), 0.5, math.nan), [(0.5, f"{low:.3g}")]
    logarithmic = low > 0 and high > LOGARITHMIC * low
    scaled, ends = (np.log(values), np.log([low, high])) if logarithmic else (values, np.array([low, high]))
    middle = math.sqrt(low * high) if logarithmic else (low + high) / 2
    ticks = [(0.0, f"{low:.3g}"), (0.5, f"{middle:.3g}"), (1.0, f"{high:.3g}")]
    return (scaled - ends[0]) / (ends[1] - ends[0]), ticks
