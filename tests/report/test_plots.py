"""Plots hold the numbers that they are given, in colors that are readable on light and dark pages."""

from __future__ import annotations

import dataclasses
import io
import itertools

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from ncsn.report.diagnostics import quality_plot, quality_section
from ncsn.report.plots import (
    NfeCurve,
    epsilon_versus_quality,
    loss_curves,
    loss_heat_map,
    quality_versus_nfe,
    search_coordinates,
    under_trained_levels,
)
from ncsn.report.style import INK, LEVEL_COLORS, PALETTE, to_png, to_svg
from ncsn.runs.costs import load_prices

SIGMAS = np.geomspace(1, 0.01, 10)
SEEN = np.array([1000, 2000, 3000])
MINIMUM = 0.25**2 / (0.25**2 + SIGMAS**2)  # loss of the perfect network for data of standard deviation 0.25
LOSSES = MINIMUM * np.array([[3.0], [1.5], [1.0]])
PAGES = ((1.0, 1.0, 1.0), to_rgb("#161616"))
FID = "Fréchet distance (classifier, 512 images)"


def contrast(a, b) -> float:
    """WCAG 2: (lighter + 0.05) / (darker + 0.05) of the relative luminances."""

    def luminance(color) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in color]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", PAGES)
def test_ink_and_colors_are_legible_on_a_light_and_on_a_dark_page(page) -> None:
    colors = [to_rgb(INK), *map(to_rgb, PALETTE), *(LEVEL_COLORS(t)[:3] for t in np.linspace(0, 1, 21))]
    assert min(contrast(color, page) for color in colors) >= 3


def test_a_perfect_network_is_not_under_trained() -> None:
    assert under_trained_levels(MINIMUM) == []
    assert under_trained_levels([0.1, 0.9]) == [], "two levels have no neighbors to compare with"


@pytest.mark.parametrize("level", range(10))
def test_each_level_well_above_its_neighbors_is_found(level) -> None:
    losses = MINIMUM.copy()
    losses[level] *= 2 if level else 4  # the first level is expected below the second
    assert under_trained_levels(losses) == [level]


def test_loss_curves_hold_the_numbers() -> None:
    losses = LOSSES.copy()
    losses[1, 4] = np.nan
    axes = loss_curves(SEEN, losses, sigmas=SIGMAS).axes[0]
    lines = axes.get_lines()[: len(SIGMAS)]
    for level, line in enumerate(lines):
        known = np.isfinite(losses[:, level])
        np.testing.assert_array_equal(line.get_xydata(), np.column_stack([SEEN, losses[:, level]])[known])


def test_heat_map_points_at_the_under_trained_level() -> None:
    losses = LOSSES.copy()
    losses[-1, 6] *= 2
    axes = loss_heat_map(SEEN, losses, sigmas=SIGMAS).axes[0]
    assert [(text.get_text(), text.xy[1]) for text in axes.texts] == [("◀", 6)]
    assert not loss_heat_map(SEEN, LOSSES, sigmas=SIGMAS).axes[0].texts


def test_one_point_and_one_level_are_drawn() -> None:
    for plot in (loss_curves, loss_heat_map):
        assert to_png(plot([1000], [[0.5]], sigmas=[0.1]))


def test_quality_is_drawn_in_order_of_nfe() -> None:
    curve = NfeCurve(nfe=[100, 10, 50], quality=[5.0, 30.0, 8.0], labels=["1 s", "2 s", "3 s"])
    axes = quality_versus_nfe({"heun": curve}, quality_label=FID, real=2.0).axes[0]
    assert axes.get_lines()[0].get_xydata().tolist() == [[10, 30], [50, 8], [100, 5]]
    assert {text.get_text(): text.xy for text in axes.texts} == {"1 s": (100, 5.0), "2 s": (10, 30.0), "3 s": (50, 8.0)}
    assert axes.get_ylabel() == FID


def test_labels_of_close_points_do_not_overlap() -> None:
    one, two = (NfeCurve([9, 17, 34], [30.0, 22.0, last], ["5 s · 0.0002 EUR"] * 3) for last in (21.9, 22.0))
    three = NfeCurve([33, 35, 993], [22.0, 22.0, 24.9], ["20 s · 0.00079 EUR"] * 3)
    figure = quality_versus_nfe({"heun": one, "2m": two, "flow": three}, quality_label=FID, real=21.0)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])] == []
    whole = figure.bbox
    assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 for box in boxes)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["9", "17", "33", "", "", "993"]


def test_a_quality_that_is_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="heun"):
        quality_versus_nfe({"heun": NfeCurve([10, 20], [5.0, float("nan")], ["", ""])}, quality_label=FID, real=2.0)


def test_a_diverged_epsilon_is_marked_apart() -> None:
    axes = epsilon_versus_quality([1e-3, 1e-5, 1e-4], [np.nan, 9.0, 4.0], quality_label=FID, chosen=1e-4).axes[0]
    curve, diverged, chosen = axes.get_lines()
    assert curve.get_xydata().tolist() == [[1e-5, 9], [1e-4, 4]]
    assert diverged.get_xdata().tolist() == [1e-3]
    assert list(chosen.get_xdata()) == [1e-4, 1e-4]


def test_search_lays_numbers_out_by_their_logarithm_and_words_by_the_alphabet() -> None:
    settings = {"optimizer.learning_rate": [1e-4, 1e-3, 1e-2], "network.kind": ["unet", "ncsn", "unet"]}
    figure = search_coordinates(settings, [10.0, 30.0, float("nan")], quality_label="fid")
    lines = {tuple(np.round(line.get_ydata(), 6)): line for line in figure.axes[0].get_lines()}
    best, worst, failed = lines[0, 1, 0], lines[0.5, 0, 1], lines[1, 1]
    assert best.get_linewidth() > worst.get_linewidth() > failed.get_linewidth()


def test_files_depend_on_the_figure_alone_and_have_no_background() -> None:
    def files(salt: str = "one") -> tuple[bytes, str]:
        figure = epsilon_versus_quality([1.0, 2.0], [3.0, 4.0], quality_label=FID)
        return to_png(figure), to_svg(figure, salt=salt)

    png, svg = files()
    with mpl.rc_context({"axes.facecolor": "red", "savefig.facecolor": "red", "font.size": 30}):
        assert files() == (png, svg)
    assert Image.open(io.BytesIO(png)).convert("RGBA").getpixel((0, 0))[3] == 0
    assert svg.startswith("<svg") and "currentColor" in svg and INK not in svg
    assert "<date>" not in svg and "dc:date" not in svg
    assert svg != files("two")[1], "the IDs of two plots in one page differ by their salt"


def test_quality_costs_money_by_the_price_table() -> None:
    """1,800 s per 1,000 images on two cores are an hour of a core; with a GPU also half an hour of that."""
    prices = dataclasses.replace(load_prices(), currency="EUR", cpu_core_hour=0.5, gpu_hour=3.0)
    points = [
        {"sampler": {"kind": "karras_heun"}, "nfe": nfe, "fid": fid, "num_images": 99, "seconds_per_1000_images": 1800}
        for nfe, fid in ((10, 9.0), (40, 4.0))
    ]
    measured = {"metric": "fid_n99", "points": points, "real": {"fid": 1.0, "num_images": 99}, "cores": 2, "gpus": 0}
    section = quality_section(measured, prices)
    assert section.table[0][-2:] == ("seconds per 1,000 images", "EUR per 1,000 images")
    assert section.table[1] == ("karras heun", "10", "9", "1,800", "0.5")
    assert "2 cores at 0.5 EUR per core-hour" in section.text
    assert [text.get_text() for text in quality_plot(measured, prices).axes[0].texts] == ["1,800 s · 0.5 EUR"] * 2
    on_gpu = quality_section({**measured, "cores": 1, "gpus": 1}, prices)
    assert on_gpu.table[1][-1] == "1.8"
    assert "1 core at 0.5 EUR" in on_gpu.text and "1 GPU at 3" in on_gpu.text
