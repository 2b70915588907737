"""Sections about scores, with their plots: by class, and of the candidates that the checkpoint is chosen from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ncsn.report.cards import CLASS_HEAD, candidate_rows, class_rows, few_samples
from ncsn.report.page import Plot, Section
from ncsn.report.plots import SEEN_LABEL
from ncsn.report.style import HEAT, INK, PALETTE, bare, new_figure, styled, to_png, to_svg
from ncsn.report.words import read_metrics

MOST_CLASSES = 20  # in the table, and with names beside the matrix


def classes_section(classes: Mapping[str, Any]) -> Section:
    """The section of an evaluation's `classes`."""
    table = class_rows(classes, most=MOST_CLASSES)
    agreement, real = classes["agreement"], classes["real_agreement"]
    compared = "" if real is None else f" Of the real test images it classifies {real:.1%} correctly."
    observer = "A linear probe of the extractor's features" if classes["by_probe"] else "The classifier"
    asked, total = sum(line["num_images"] > 0 for line in classes["table"]), len(classes["table"])
    some = f"{total} classes" if asked == total else f"{asked} of its {total} classes"
    shown = f" The table has the {len(table)} of them that agree least." if len(table) < total else ""
    return Section(
        heading="Classes",
        text=f"The model generated images of {some}. {observer} "
        f"assigns {agreement:.1%} of them to the requested class.{compared} The kernel distance is to the training "
        f"images of the class: near zero, or negative, where they are alike.{shown}",
        plots=[Plot(to_svg(confusion_matrix(classes), salt="classes"), alt="Requested and predicted classes")],
        table=[CLASS_HEAD, *table],
    )


@styled
def confusion_matrix(classes: Mapping[str, Any]) -> Figure:
    """Shares of the images of each class, rows, that are classified as each class, columns."""
    counts, names = np.array(classes["confusion"], np.float64), [line["name"] for line in classes["table"]]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.3 * min(len(names), MOST_CLASSES)
    figure = new_figure(side + 0.8, side)
    axes = bare(figure.subplots())
    image = axes.imshow(shares, vmin=0, vmax=1, cmap=HEAT, interpolation="none")
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the images")
    axes.set(xlabel="predicted class", ylabel="requested class")
    if len(names) <= MOST_CLASSES:
        short = [name if len(name) <= 14 else f"{name[:13]}…" for name in names]
        axes.set_xticks(range(len(names)), short, rotation=60, ha="right")
        axes.set_yticks(range(len(names)), short)
    return figure


MOST_ROWS = 20

Rows = Sequence[Mapping[str, Any]]


@styled
def selection_figure(rows: Rows, *, metric: str) -> Figure:
    """The `metric` of each candidate over images seen, and over the relative widths of those that have one."""
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
    drawn.axes[0].set(ylabel=metric.removeprefix("eval/"))
    return drawn


def selection_png(rows: Rows, *, metric: str) -> bytes:
    """The same as a PNG file."""
    return to_png(selection_figure(rows, metric=metric))


def selection_section(result: Mapping[str, Any]) -> Section:
    """The candidates, by the result of the step select."""
    rows, metric = result["candidates"], result["figure"]
    reading = next(iter(read_metrics({metric: result["value"]}).values()))
    table, more = candidate_rows(rows, most=MOST_ROWS)
    left = f" The table has the best {MOST_ROWS}; {more} more are in {result['uri']}." if more else ""
    return Section(
        heading="Choice of the checkpoint",
        text=f"Each of {len(rows)} candidates generated {reading.num_images:,} images from the same noise, and the one "
        f"with the lowest {metric} was chosen. Its score here is optimistic because it was selected; the scores "
        f"above use new samples.{left}",
        plots=[Plot(to_svg(selection_figure(rows, metric=metric), salt="selection"), alt="Candidates and scores")],
        hints=[few] if (few := few_samples(metric)) else [],
        table=[("images seen", "relative width", metric, "checkpoint"), *table],
    )
