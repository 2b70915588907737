"""Panels of images with words at their rows and columns: uint8 arrays in, a matplotlib figure out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ncsn.report.stages import evenly_spread
from ncsn.report.style import PALETTE, bare, new_figure, styled

Images = NDArray[np.uint8]

GAP = 1 / 14
"""Between images, of their side."""
CELL_INCHES = 0.62
MAX_STAGES = 12


@styled
def samples_at_levels(frames: Images, *, sigmas: Sequence[float]) -> Figure:
    """Images as annealing makes them: one row per image, one column per stage, most noise left.

    Args:
        frames: [stages, N, H, W, C], the start and then one per visited level; at most 12 of them, the first and the
            last among these, are shown.
        sigmas: Sigma of each visited level, one fewer than the stages.

    Raises:
        ValueError: if the numbers of stages and levels do not fit.
    """
    if len(sigmas) != len(frames) - 1:
        raise ValueError(f"expected one sigma for each of {len(frames) - 1} levels after the start, got {len(sigmas)}")
    shown = evenly_spread(len(frames), most=MAX_STAGES)
    names = ["start" if stage == 0 else f"{sigmas[stage - 1]:.2g}" for stage in shown]
    figure, axes = _panel([list(row) for row in frames[shown].swapaxes(0, 1)], header=names)
    axes.set_xlabel("sigma of the level just finished (pixels in [0, 1])")
    return figure


@styled
def neighbours_panel(
    samples: Images, neighbours: Images, *, distances: NDArray[np.float64] | None = None, memorised: Sequence[bool] = ()
) -> Figure:
    """Samples, each beside its nearest training images.

    Args:
        samples: [N, H, W, C].
        neighbours: [N, k, H, W, C], nearest first.
        distances: [N, k], written below each neighbour.
        memorised: [N], marks the samples that are copies.
    """
    count = neighbours.shape[1]
    header = ["sample", "nearest", *(str(place) for place in range(2, count + 1))]
    figure, axes = _panel(
        [[sample, *row] for sample, row in zip(samples, neighbours, strict=True)],
        header=header,
        captions=None if distances is None else [["", *map(_digits, row)] for row in distances],
        apart=1,
    )
    for row in np.flatnonzero(memorised):
        place = (0.5, row * _pitch(captions=distances is not None) + 0.98)
        box = {"facecolor": PALETTE[1], "edgecolor": "none", "pad": 1}
        axes.annotate("copy", place, color="white", fontsize=6, ha="center", va="bottom", bbox=box)
    return figure


@styled
def inpainting_panel(originals: Images, completions: Images, *, mask: NDArray[np.bool_]) -> Figure:
    """Test images, what was given of them, and its completions.

    Args:
        originals: [N, H, W, C].
        completions: [N, k, H, W, C].
        mask: [H, W], true where a pixel was given.
    """
    given = [np.where(mask[..., None], image, np.uint8(128)) for image in originals]
    rows = [[image, part, *made] for image, part, made in zip(originals, given, completions, strict=True)]
    count = completions.shape[1]
    return _panel(rows, header=["original", "given", *(f"{number}" for number in range(1, count + 1))], apart=2)[0]


@styled
def interpolation_panel(images: Images) -> Figure:
    """Generated images, and what lies between each two of them: one row per pair.

    Args:
        images: [pairs, N, H, W, C], an image at each end of a row.
    """
    between = (f"{k / (images.shape[1] - 1):.2f}" for k in range(1, images.shape[1] - 1))
    figure, axes = _panel([list(row) for row in images], header=["one", *between, "other"])
    axes.set_xlabel("share of the way from the noise of the one image to that of the other")
    return figure


def _panel(
    rows: Sequence[Sequence[Images]],
    *,
    header: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
    apart: int = 0,
) -> tuple[Figure, Axes]:
    """Equal images in rows; one unit of the axes is one image.

    Args:
        rows: Images [H, W, C].
        header: A word above each column.
        captions: A word below each image.
        apart: So many columns at the left stand a little apart from the others.
    """
    pitch, shift = _pitch(captions=captions is not None), 0.25 if apart else 0.0
    width, height = len(header) * (1 + GAP) + shift, len(rows) * pitch
    figure = new_figure(CELL_INCHES * width + 0.2, CELL_INCHES * height + 0.5)
    axes = bare(figure.subplots())
    for column, word in enumerate(header):
        left = column * (1 + GAP) + (shift if column >= apart else 0.0)
        axes.annotate(word, (left + 0.5, -0.1), ha="center", va="bottom", fontsize=8, annotation_clip=False)
        for row, images in enumerate(rows):
            top = row * pitch
            image = images[column][..., 0] if images[column].shape[-1] == 1 else images[column]
            place = (left, left + 1, top + 1, top)
            axes.imshow(image, extent=place, cmap="gray", vmin=0, vmax=255, interpolation="none")
            if captions is not None:
                axes.annotate(captions[row][column], (left + 0.5, top + 1.03), ha="center", va="top", fontsize=6)
    axes.set(xlim=(0, width), ylim=(height, -0.05), aspect="equal")
    return figure, axes


def _digits(distance: float) -> str:
    """Three digits, and all whole ones of a large number: 1.06e+03 is hard to compare with 998."""
    return f"{distance:.0f}" if distance >= 100 else f"{distance:.3g}"


def _pitch(*, captions: bool) -> float:
    """Distance of two rows."""
    return 1 + GAP + (0.22 if captions else 0.0)
