"""Images on their way from noise, as a film."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ncsn.core.images import image_grid
from ncsn.report.figures import png_bytes
from ncsn.report.page import Film, Picture
from ncsn.report.stages import evenly_spread

MOST_PIXEL_BYTES = 1_000_000
"""Of all frames together, because noise does not compress."""
MOST_FRAMES = 48
FEWEST_FRAMES = 8


def film(frames: NDArray[np.uint8], *, sigmas: Sequence[float]) -> Film:
    """A film of at most 48 frames; large images are fewer.

    Args:
        frames: `[stages, N, H, W, C]` uint8: the start, the images after each level, and last the finished ones.
        sigmas: Noise of each level; if there is not one per stage after the start, stages are numbered.
    """
    frames = frames[:, : max(1, MOST_PIXEL_BYTES // (FEWEST_FRAMES * frames[0, 0].size))]
    stages, count = frames.shape[:2]
    chosen = evenly_spread(stages, most=max(2, min(MOST_FRAMES, MOST_PIXEL_BYTES // frames[0].size)))
    rows = [image_grid(frames[stage], columns=count) for stage in chosen]
    height, width = rows[0].shape[:2]
    picture = Picture(
        png_bytes(np.concatenate(rows), enlarge=False),
        alt=f"{count} images at {len(chosen)} stages, from noise at the top to the finished images at the bottom",
    )
    return Film(picture, size=(width, height), labels=[_label(stage, stages, sigmas) for stage in chosen])


def _label(stage: int, stages: int, sigmas: Sequence[float]) -> str:
    if stage == 0:
        return "start: noise"
    if stage == stages - 1:
        return "finished"
    return f"noise {sigmas[stage - 1]:.3g}" if len(sigmas) == stages - 1 else f"stage {stage} of {stages - 1}"
