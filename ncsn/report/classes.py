"""The scores by class: a section of the report with a table and the matrix of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ncsn.report.cards import CLASS_HEAD, class_rows
from ncsn.report.page import Plot, Section
from ncsn.report.style import HEAT, bare, new_figure, styled, to_svg

MOST_CLASSES = 20  # in the table, and with names beside the matrix


def classes_section(classes: Mapping[str, Any]) -> Section:
    """The section of an evaluation's `classes`."""
    table = class_rows(classes, most=MOST_CLASSES)
    agreement, real = classes["agreement"], classes["real_agreement"]
    compared = "" if real is None else f" It sees the class of {real:.1%} of the real test images."
    asked = sum(line["num_images"] > 0 for line in classes["table"])
    total = len(classes["table"])
    some = f"{total} classes" if asked == total else f"{asked} of its {total} classes"
    shown = f" The table has the {len(table)} of them that agree least." if len(table) < len(classes["table"]) else ""
    return Section(
        heading="Classes",
        text=f"The model was asked for images of {some}. {_SEEN[classes['by_probe']]} sees "
        f"the class that was asked for in {agreement:.1%} of them.{compared} The kernel distance is to the training "
        f"images of the class: near zero, or negative, where they are alike.{shown}",
        plots=[Plot(to_svg(confusion_matrix(classes), salt="classes"), alt="Classes asked for and classes seen")],
        table=[CLASS_HEAD, *table],
    )


_SEEN = {False: "The classifier", True: "A linear probe of the extractor's features"}


@styled
def confusion_matrix(classes: Mapping[str, Any]) -> Figure:
    """Shares of the images of each class, rows, that are seen as each class, columns."""
    counts, names = np.array(classes["confusion"], np.float64), [line["name"] for line in classes["table"]]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.3 * min(len(names), MOST_CLASSES)
    figure = new_figure(side + 0.8, side)
    axes = bare(figure.subplots())
    image = axes.imshow(shares, vmin=0, vmax=1, cmap=HEAT, interpolation="none")
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the images")
    axes.set(xlabel="class seen", ylabel="class asked for")
    if len(names) <= MOST_CLASSES:
        axes.set_xticks(range(len(names)), _short(names), rotation=60, ha="right")
        axes.set_yticks(range(len(names)), _short(names))
    return figure


def _short(names: Sequence[str]) -> list[str]:
    return [name if len(name) <= 14 else f"{name[:13]}…" for name in names]
