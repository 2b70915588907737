"""Hints about a run: signs of too little training, of memorization, and of settings that do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncsn.config.training import TrainConfig, ema_setting
from ncsn.core.images import DataMoments
from ncsn.core.noise_schedule import best_epsilon, variance_ratio
from ncsn.core.samplers.settings import AnnealedLangevin, Sampler
from ncsn.evaluation.copies import Copies
from ncsn.runs.history import HeldOutCurves

Array = NDArray[np.float64]

# The training loss is an average over noisy batches, and of other weights than the EMA.
LINEAR_MARGIN = 1.05
HARMFUL_SHARE = 0.05  # of the initial weights in their EMA
VARIANCE_MARGIN = 1.25  # over the variance of the level that the best step size leaves


def linear_loss(moments: DataMoments, sigmas: Sequence[float]) -> Array:
    """Normalized loss of the best linear denoiser at each level [L]; a trained network has a lower one.

    For data of covariance eigenvalues v it predicts the noise z up to a mean square error of v / (v + sigma^2).
    """
    dimension, known = moments.mean.numel(), len(moments.variances)
    variances = np.full(dimension, moments.rest)
    variances[:known] = moments.variances.double().numpy()
    squared = np.square(np.asarray(sigmas, np.float64))[:, None]
    losses: Array = (variances / (variances + squared)).mean(axis=1)
    return losses


def training_hints(losses: Array, *, linear: Array, sigmas: Sequence[float]) -> list[str]:
    """A hint if a linear denoiser, with losses [L], beats the network, with losses [P, L] over time, NaN if unknown."""
    known = np.isfinite(losses)
    rows = len(losses) - 1 - known[::-1].argmax(axis=0)  # of the last one that is known
    last = np.where(known.any(axis=0), losses[rows, np.arange(losses.shape[1])], np.nan)
    behind = np.flatnonzero(last > LINEAR_MARGIN * linear)
    if not len(behind):
        return []
    worst = int(behind[np.argmax(last[behind] / linear[behind])])
    where = ", ".join(f"{sigmas[number]:.3g}" for number in behind.tolist())
    return [
        f"Undertrained at sigma {where}: the best linear denoiser of the training images has a lower loss, most "
        f"clearly at {sigmas[worst]:.3g} ({linear[worst]:.3g} versus {last[worst]:.3g}). Increase train.num_images "
        "or the width of the network."
    ]


def average_hints(settings: TrainConfig, *, images_seen: int) -> list[str]:
    """A hint if the EMA weights still contain much of the initial ones."""
    left = settings.averaging.untrained_share(images_seen, batch_size=settings.batch_size)
    if left < HARMFUL_SHARE:
        return []
    return [
        f"The EMA weights, which generate the images, still contain {left:.0%} of the initial weights. Train longer, "
        f"or decrease {ema_setting(settings)}."
    ]


def sampler_hints(sampler: Sampler, sigmas: Sequence[float]) -> list[str]:
    """A hint if the epsilon of annealed Langevin dynamics is far from technique 4 of NCSNv2."""
    if not isinstance(sampler, AnnealedLangevin):
        return []
    sigma_L, ratio, steps = sigmas[-1], sigmas[-2] / sigmas[-1], sampler.steps_per_level
    best = best_epsilon(sigma_L=sigma_L, ratio=ratio, steps_per_level=steps)
    if sampler.epsilon >= 2 * sigma_L**2:
        return [
            f"epsilon = {sampler.epsilon:g} is too large: the chain diverges at 2 sigma_L² and above. Use {best:.2g}."
        ]
    variance, least = (
        variance_ratio(epsilon, sigma_L=sigma_L, ratio=ratio, steps_per_level=steps)
        for epsilon in (sampler.epsilon, best)
    )
    if variance < VARIANCE_MARGIN * least:
        return []
    size, cause = ("large", "the added noise") if sampler.epsilon > best else ("small", "noise of the previous level")
    return [
        f"epsilon = {sampler.epsilon:g} is too {size}: {cause} leaves {variance:.2g} times the variance that a level "
        f"should have. With {steps} steps per level, {best:.2g} fits these levels (NCSNv2, technique 4)."
    ]


ADVICE = (
    "Add images, train with data.augmentation, or set data.horizontal_flip if mirrored images are still realistic; or "
    "train a smaller network, or for fewer train.num_images."
)


def overfitting_hints(curves: HeldOutCurves) -> list[str]:
    """A sentence if the held-out loss has risen since its lowest value."""
    if curves.lowest_at is None:
        return []
    return [f"The held-out loss was lowest at {curves.lowest_at:,} images: longer training memorizes. {ADVICE}"]


GROWN = 0.02  # of the gap in the last half, relative to the held-out loss; less may be noise


def held_out_conclusion(curves: HeldOutCurves) -> str:
    """What the curves of the held-out loss say, in a sentence; empty for too few points."""
    if curves.lowest_at is not None:
        return f"Here it has risen since {curves.lowest_at:,} images: longer training memorizes."
    before, now = curves.gap[len(curves.gap) // 2], curves.gap[-1]
    if now - before > GROWN * curves.loss[-1]:
        grown = f"Here the gap grew from {before:.2g} to {now:.2g} in the second half, "
        if curves.loss[-1] < curves.loss[len(curves.loss) // 2]:
            return f"{grown}as in any training, while the held-out loss fell: longer training does not memorize yet."
        return f"{grown}and the held-out loss no longer falls: the model begins to memorize."
    return "" if len(curves.gap) < 3 else "Here neither is seen: longer training does not memorize yet."


def copying_hints(audit: Mapping[str, Any]) -> list[str]:
    """Warnings that samples are nearer to the training images than unseen images are, by their audit."""
    copies, share = Copies(**audit["copies"]), audit["closeness"]
    hints = [f"The model memorizes training images. {copies}. {ADVICE}"] if copies.more_than_chance else []
    if copies.unclear:
        hints.append(f"{copies}.")
    if share["low"] > share["expected"]:
        hints.append(
            f"{share['value']:.1%} of the generated images are nearer to a training image than to any test image; of "
            f"unseen images it would be {share['expected']:.1%}: the model leans on its training images."
        )
    if pairs := len(audit["near_duplicates"]):
        hints.append(f"{pairs:,} test images nearly equal a training image, which flatters every figure but the audit.")
    return hints
