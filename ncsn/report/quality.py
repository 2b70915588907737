"""What more network evaluations buy, and what they cost: a plot, and the section of the report about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from ncsn.report.page import Figures, Plot
from ncsn.report.plots import NfeCurve, quality_versus_nfe
from ncsn.report.style import to_svg
from ncsn.runs.costs import Prices, cost

Measured = Mapping[str, Any]
"""As `ncsn.steps.figure_numbers.quality` gives it."""


def quality_plot(measured: Measured, prices: Prices) -> Figure:
    """Quality over evaluations per image, with seconds and money per 1,000 images beside each point."""
    points, real = measured["points"], measured["real"]
    curves = {
        _words(kind): NfeCurve(
            nfe=[point["nfe"] for point in points if point["sampler"]["kind"] == kind],
            quality=[point["fid"] for point in points if point["sampler"]["kind"] == kind],
            labels=[_label(point, measured, prices) for point in points if point["sampler"]["kind"] == kind],
        )
        for kind in dict.fromkeys(point["sampler"]["kind"] for point in points)
    }
    return quality_versus_nfe(
        curves,
        quality_label=f"Fréchet distance, {points[0]['num_images']:,} images",
        real=real["fid"],
        real_label=f"{real['num_images']:,} real test images",
    )


def quality_panel(measured: Measured, prices: Prices) -> Figures:
    """The section, with plot and table."""
    points = measured["points"]
    rows = [
        (
            _words(point["sampler"]["kind"]),
            f"{point['nfe']:,}",
            f"{point['fid']:.4g}",
            amount(point["seconds_per_1000_images"]),
            amount(_money(point, measured, prices)),
        )
        for point in points
    ]
    header = ("sampler", "NFE", measured["metric"], "seconds per 1,000 images", f"{prices.currency} per 1,000 images")
    return Figures(
        heading="Quality against cost",
        text="Time goes into network evaluations, so many per image (NFE). The lower the distance to the training "
        f"images the better; it is measured over {points[0]['num_images']:,} images here, so it compares within this "
        f"figure only. Beside each point: seconds and money per 1,000 images. {money_note(measured, prices)}",
        plots=[Plot(to_svg(quality_plot(measured, prices), salt="quality"), alt="Fréchet distance over evaluations")],
        table=[header, *rows],
    )


def money_note(measured: Measured, prices: Prices) -> str:
    """What the money is reckoned with, in a sentence."""
    cores, gpus = measured["cores"], measured["gpus"]
    priced = f"{cores} {'core' if cores == 1 else 'cores'} at {prices.cpu_core_hour:g} {prices.currency} an hour"
    if gpus:
        priced += f" and {gpus} GPU at {prices.gpu_hour:g}"
    return f"Money is for {priced} while images are made, by the price table of `ncsn plan`; start-up is not in it."


def _money(point: Mapping[str, Any], measured: Measured, prices: Prices) -> float:
    seconds = point["seconds_per_1000_images"]
    return cost(seconds, cores=measured["cores"], gpus=measured["gpus"], prices=prices).money


def _label(point: Mapping[str, Any], measured: Measured, prices: Prices) -> str:
    money = amount(_money(point, measured, prices))
    return f"{amount(point['seconds_per_1000_images'])} s · {money} {prices.currency}"


def amount(value: float) -> str:
    """Two digits of a small number and all whole digits of a large one: `0.00052`, `1.7`, `1,800`."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _words(kind: str) -> str:
    return kind.replace("_", " ")
