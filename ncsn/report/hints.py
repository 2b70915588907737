"""What the curves and settings of a run suggest to do, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ncsn.config.choices import AnnealedLangevinConfig, SamplerConfig
from ncsn.config.schema import TrainConfig
from ncsn.core.images import DataMoments
from ncsn.core.noise_schedule import best_epsilon, variance_ratio

Array = NDArray[np.float64]

LINEAR_MARGIN = 1.05
"""The training loss is an average over noisy batches, and not of the EMA weights."""
AVERAGE_LEFT = 0.05
"""Share of the untrained weights in their running average that does harm."""
VARIANCE_MARGIN = 1.25
"""Variance over that of the level, above which a sampler's step is called wrong."""


def linear_loss(moments: DataMoments, sigmas: Sequence[float]) -> Array:
    """Normalised loss of the best linear denoiser at each level [L]; a trained network reads less.

    For data of covariance eigenvalues v it predicts the noise z up to a mean square error of v / (v + sigma^2).
    """
    dimension, known = moments.mean.numel(), len(moments.variances)
    variances = np.full(dimension, moments.rest)
    variances[:known] = moments.variances.double().numpy()
    squared = np.square(np.asarray(sigmas, np.float64))[:, None]
    losses: Array = (variances / (variances + squared)).mean(axis=1)
    return losses


def training_hints(losses: Array, *, linear: Array, sigmas: Sequence[float]) -> list[str]:
    """A sentence if the network is beaten by a linear denoiser at some levels.

    Args:
        losses: Normalised loss of each level at the end [L], NaN where it is not known.
        linear: What `linear_loss` gives for the same levels [L].
        sigmas: The levels [L].
    """
    behind = np.flatnonzero(losses > LINEAR_MARGIN * linear)
    if not len(behind):
        return []
    worst = behind[np.argmax(losses[behind] / linear[behind])]
    return [
        f"{_levels(behind.tolist())} {'is' if len(behind) == 1 else 'are'} under-trained: a straight-line denoiser of "
        f"the same images does better, most plainly at sigma {sigmas[worst]:.3g} ({linear[worst]:.3g} against "
        f"{losses[worst]:.3g}). Raise train.num_images, or the network's width."
    ]


def average_hints(settings: TrainConfig, *, images_seen: int) -> list[str]:
    """A sentence if the EMA weights, which draw the images, still hold much of the untrained ones."""
    left = settings.ema_decay ** (images_seen / settings.batch_size)
    if left < AVERAGE_LEFT:
        return []
    return [
        f"The averaged weights, which draw the images, still hold {left:.0%} of the untrained ones: train longer, or "
        f"lower train.ema_decay = {settings.ema_decay:g}."
    ]


def sampler_hints(sampler: SamplerConfig, sigmas: Sequence[float]) -> list[str]:
    """A sentence if annealed Langevin's epsilon is far from what technique 4 of NCSNv2 asks for."""
    if not isinstance(sampler, AnnealedLangevinConfig):
        return []
    sigma_L, ratio, steps = sigmas[-1], sigmas[-2] / sigmas[-1], sampler.steps_per_level
    best = best_epsilon(sigma_L=sigma_L, ratio=ratio, steps_per_level=steps)
    if sampler.epsilon >= 2 * sigma_L**2:
        return [f"epsilon = {sampler.epsilon:g} is too large: the chain diverges from 2 sigma_L² on. Use {best:.2g}."]
    variance, least = (
        variance_ratio(epsilon, sigma_L=sigma_L, ratio=ratio, steps_per_level=steps)
        for epsilon in (sampler.epsilon, best)
    )
    if variance < VARIANCE_MARGIN * least:
        return []
    fault = "large: its own noise" if sampler.epsilon > best else "small: noise of the level before"
    return [
        f"epsilon = {sampler.epsilon:g} is too {fault} leaves {variance:.2g} times the variance that a level should "
        f"have. With {steps} steps per level {best:.2g} fits these levels (NCSNv2, technique 4)."
    ]


def _levels(levels: Sequence[int]) -> str:
    """`Level 3`, `Levels 0 to 4`, `Levels 1, 3 and 7`."""
    if len(levels) == 1:
        return f"Level {levels[0]}"
    if levels[-1] - levels[0] == len(levels) - 1:
        return f"Levels {levels[0]} to {levels[-1]}"
    return f"Levels {', '.join(map(str, levels[:-1]))} and {levels[-1]}"
