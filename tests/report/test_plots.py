"""Plots hold the numbers and pictures the images that they are given, in colors for light and dark pages."""

from __future__ import annotations

import io

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from ncsn.report.images import CARD_PIXELS, grid_png, neighbors_png, rows_by_class, smaller_png
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

FID = "Fréchet distance (classifier, 512 images)"


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_each_sample_is_beside_its_training_image() -> None:
    samples, training = np.full((6, 8, 8, 1), 10, np.uint8), np.arange(6, dtype=np.uint8).repeat(64).reshape(6, 8, 8, 1)
    picture = pixels(neighbors_png(samples, training))
    cell = picture.shape[1] * 9 // 73
    found = [[picture[int((row + 0.5) * cell), int((column + 0.5) * cell)] for column in range(8)] for row in range(2)]
    assert found == [[10, 0, 10, 1, 10, 2, 10, 3], [10, 4, 10, 5, 0, 0, 0, 0]]
    wide = np.zeros((9, 512, 512, 3), np.uint8)
    assert pixels(neighbors_png(wide, wide)).shape[0] < 600, "four samples, in one line"


def test_a_card_has_a_small_picture() -> None:
    grid = grid_png(np.zeros((64, 8, 4, 1), np.uint8))
    assert max(pixels(grid).shape) > 2 * CARD_PIXELS == 2 * max(pixels(smaller_png(grid)).shape)


def test_a_grid_has_a_row_for_each_of_the_first_classes() -> None:
    rows = rows_by_class(np.arange(100) % 10)
    assert rows.shape == (10, 8) and (rows % 10 == np.arange(10)[:, None]).all() and rows[0].tolist()[:2] == [0, 10]
    assert rows_by_class(np.array([2, 0, 2, 0, 2])).tolist() == [[1, 3], [0, 2]]
    assert rows_by_class(np.arange(3000) % 1000).shape == (16, 3)
    rare = np.array([0, 1, 2, 2, *[0, 1] * 20, *[3] * 6])  # 2 would leave the others two columns
    assert rows_by_class(rare).shape == (3, 6) and (rare[rows_by_class(rare)] == [[0], [1], [3]]).all()
    assert rows_by_class(np.full(100, 3)).tolist() == np.arange(64).reshape(8, 8).tolist()
    assert rows_by_class(np.full(5, 3)).tolist() == [[0, 1, 2, 3, 4]]


def test_colors_are_legible_on_a_light_and_on_a_dark_page() -> None:
    def luminance(color) -> float:
        """Relative, with what WCAG 2 adds to both for their contrast."""
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(color)]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear)) + 0.05

    for color in (INK, *PALETTE, *map(LEVEL_COLORS, np.linspace(0, 1, 21))):
        assert 3 * luminance("#161616") <= luminance(color) <= luminance("white") / 3, color


def test_loss_curves_hold_the_numbers() -> None:
    seen, losses = np.array([1000, 2000, 3000]), np.array([[3.0], [1.5], [1.0]]) * np.linspace(0.2, 0.9, 10)
    losses[1, 4] = np.nan
    lines = loss_curves(seen, losses, sigmas=np.geomspace(1, 0.01, 10)).axes[0].get_lines()
    for level, line in enumerate(lines[:10]):
        known = np.isfinite(losses[:, level])
        np.testing.assert_array_equal(line.get_xydata(), np.column_stack([seen, losses[:, level]])[known])
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
