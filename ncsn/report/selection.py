"""The choice among the checkpoints of a run: its plot, and its section in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ncsn.report.cards import candidate_rows, few_samples
from ncsn.report.page import Plot, Section
from ncsn.report.plots import SEEN_LABEL
from ncsn.report.style import INK, PALETTE, new_figure, styled, to_png, to_svg
from ncsn.report.words import read_figures

MOST_ROWS = 20

Rows = Sequence[Mapping[str, Any]]


@styled
def selection_figure(rows: Rows, *, figure: str) -> Figure:
    """The figure of each candidate over images seen, and over the relative widths of those that have one.

    Args:
        rows: Candidates: images_seen, relative_width, and value, None if an image is not finite.
        figure: Name of the metric.
    """
    scored = [row for row in rows if row["value"] is not None]
    best = min(scored, key=lambda row: row["value"])
    plain = [row for row in scored if row["relative_width"] is None]
    built = [row for row in scored if row["relative_width"] is not None]
    panels = [(each, key) for each, key in ((plain, "images_seen"), (built, "relative_width")) if each]
    drawn = new_figure(7 if len(panels) > 1 else 5, 3.2)
    for axes, (points, key) in zip(np.atleast_1d(drawn.subplots(1, len(panels), sharey=True)), panels, strict=True):
        for seen in sorted({row["images_seen"] for row in points}) if key == "relative_width" else [None]:
            line = sorted((row[key], row["value"]) for row in points if seen is None or row["images_seen"] == seen)
            axes.plot(*zip(*line, strict=True), marker="o", markersize=4, label=None if seen is None else f"{seen:,}")
        if best in points:
            axes.plot(best[key], best["value"], marker="*", markersize=13, color=PALETTE[1], markeredgecolor=INK)
        axes.set(xlabel=SEEN_LABEL if key == "images_seen" else "relative width")
        if key == "relative_width":
            axes.legend(title=SEEN_LABEL, fontsize=7)
    drawn.axes[0].set(ylabel=figure.removeprefix("eval/"))
    return drawn


def selection_png(rows: Rows, *, figure: str) -> bytes:
    """The same as a PNG file."""
    return to_png(selection_figure(rows, figure=figure))


def selection_section(result: Mapping[str, Any]) -> Section:
    """The candidates, by the result of the step select."""
    rows, figure = result["candidates"], result["figure"]
    reading = next(iter(read_figures({figure: result["value"]}).values()))
    table, more = candidate_rows(rows, most=MOST_ROWS)
    left = f" The table has the best {MOST_ROWS}; {more} more are in {result['uri']}." if more else ""
    return Section(
        heading="Choice of the checkpoint",
        text=f"Each of {len(rows)} candidates generated {reading.num_images:,} images from the same noise, and the one "
        f"with the least {figure} was chosen. It was chosen by this metric, so its value here is too good; the scores "
        f"above are of other samples.{left}",
        plots=[Plot(to_svg(selection_figure(rows, figure=figure), salt="selection"), alt="Candidates and scores")],
        hints=[few] if (few := few_samples(figure)) else [],
        table=[("images seen", "relative width", figure, "checkpoint"), *table],
    )
