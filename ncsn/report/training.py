"""The loss of each noise level over training: plots, and what they suggest to do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ncsn.report.hints import training_hints
from ncsn.report.page import Figures, Plot
from ncsn.report.plots import LevelLosses, loss_curves, loss_heat_map
from ncsn.report.stages import evenly_spread
from ncsn.report.style import to_svg

Array = NDArray[np.float64]

MOST_POINTS = 150
"""Along a curve; more would not be seen, and make the page large."""
MOST_CURVES = 24


def training_panel(
    images_seen: Sequence[int],
    level_losses: Array,
    *,
    sigmas: Sequence[float],
    linear: Array,
    hints: Sequence[str] = (),
) -> Figures:
    """The section about training.

    Args:
        images_seen: [P] with P >= 1.
        level_losses: Normalised losses [P, L]; NaN where no image had that level.
        sigmas: The levels [L], descending.
        linear: Normalised loss of the best linear denoiser at each level [L].
        hints: Sentences to add to those about the losses.
    """
    seen, losses = thinned(np.asarray(images_seen, np.float64), level_losses)
    shown = evenly_spread(len(sigmas), most=MOST_CURVES)
    levels = np.asarray(sigmas)
    heat_map = loss_heat_map(LevelLosses(seen, losses, levels))
    lines = loss_curves(LevelLosses(seen, losses[:, shown], levels[shown]))
    last = LevelLosses.of(images_seen, level_losses, sigmas=sigmas).last
    return Figures(
        heading="Training",
        text="How much of the added noise the network still fails to recognise: 1 is a network that answers nothing, "
        "0 would be perfect. Much noise is easy to tell from a picture; where the noise is fainter than the picture's "
        "own detail, nobody can tell it, and the loss stays near 1.",
        plots=[
            Plot(to_svg(heat_map, salt="heat"), alt="Loss of each noise level over training, as colours"),
            Plot(to_svg(lines, salt="lines"), alt="Loss of each noise level over training, as curves"),
        ],
        hints=[*training_hints(last, linear=linear, sigmas=sigmas), *hints],
    )


def thinned(seen: Array, losses: Array) -> tuple[Array, Array]:
    """At most `MOST_POINTS` points, each the mean of its neighbours and standing at the last of them."""
    parts = np.array_split(np.arange(len(seen)), min(len(seen), MOST_POINTS))
    known = np.isfinite(losses)
    sums = np.stack([np.where(known, losses, 0)[part].sum(axis=0) for part in parts])
    counts = np.stack([known[part].sum(axis=0) for part in parts])
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return seen[[part[-1] for part in parts]], means
