"""Plots hold the numbers that they are given, in colors that are readable on light and dark pages."""

from __future__ import annotations

import io

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from ncsn.report.plots import (
    INK,
    LEVEL_COLORS,
    PALETTE,
    epsilon_versus_quality,
    held_out_losses,
    loss_curves,
    search_coordinates,
    to_png,
    to_svg,
)

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


def test_loss_curves_hold_the_numbers() -> None:
    losses = LOSSES.copy()
    losses[1, 4] = np.nan
    lines = loss_curves(SEEN, losses, sigmas=SIGMAS).axes[0].get_lines()
    for level, line in enumerate(lines[: len(SIGMAS)]):
        known = np.isfinite(losses[:, level])
        np.testing.assert_array_equal(line.get_xydata(), np.column_stack([SEEN, losses[:, level]])[known])
    assert to_png(loss_curves([1000], [[0.5]], sigmas=[0.1])), "one point of one level"


def test_long_curves_are_thinned_to_means() -> None:
    losses = np.full((1000, 2), np.nan)
    losses[::2, 0], losses[1::2, 0] = 0.0, 1.0
    curve, unknown = loss_curves(np.arange(1.0, 1001.0), losses, sigmas=[1.0, 0.1]).axes[0].get_lines()[:2]
    assert len(curve.get_xdata()) == 150 and curve.get_xdata()[-1] == 1000
    assert curve.get_ydata() == pytest.approx(0.5, abs=0.08) and len(unknown.get_xdata()) == 0


def test_the_plot_holds_both_losses() -> None:
    (axes,) = held_out_losses([1000, 2000], [0.5, 0.4], [0.4, 0.2]).axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.get_lines()}
    assert lines == {"training images": [0.4, 0.2], "held-out images": [0.5, 0.4]}


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
        figure = epsilon_versus_quality([1.0, 2.0], [3.0, 4.0], quality_label=FID, chosen=1.0)
        return to_png(figure), to_svg(figure, salt=salt)

    png, svg = files()
    with mpl.rc_context({"axes.facecolor": "red", "savefig.facecolor": "red", "font.size": 30}):
        assert files() == (png, svg)
    assert Image.open(io.BytesIO(png)).convert("RGBA").getpixel((0, 0))[3] == 0
    assert svg.startswith("<svg") and "currentColor" in svg and INK not in svg
    assert svg != files("two")[1], "the IDs of two plots in one page differ by their salt"
