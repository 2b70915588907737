"""Sections that explain a run: training, held-out loss, quality against cost, search; and hints about its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncsn.config.training import TrainConfig, ema_setting
from ncsn.core.images import DataMoments
from ncsn.core.noise_schedule import best_epsilon, variance_ratio
from ncsn.core.samplers.settings import AnnealedLangevin, Sampler
from ncsn.report.page import Picture, Plot, Section
from ncsn.report.plots import held_out_losses, last_losses, loss_curves, loss_heat_map
from ncsn.report.style import to_svg
from ncsn.report.words import Reading
from ncsn.runs.curves import HeldOutCurves

Array = NDArray[np.float64]

# The training loss is an average over noisy batches, and of other weights than the EMA.
LINEAR_MARGIN = 1.05
HARMFUL_SHARE = 0.05  # of the initial weights in their running average
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
    """A hint if a linear denoiser beats the network at some levels; the arrays are [L], unknown losses NaN."""
    behind = np.flatnonzero(losses > LINEAR_MARGIN * linear)
    if not len(behind):
        return []
    worst = behind[np.argmax(losses[behind] / linear[behind])]
    which = f"{_numbered('bin', behind.tolist())} {'is' if len(behind) == 1 else 'are'}"
    return [
        f"{which} undertrained: the best linear denoiser of the training images has a lower loss, most clearly at "
        f"sigma {sigmas[worst]:.3g} ({linear[worst]:.3g} versus {losses[worst]:.3g}). Increase train.num_images or the "
        "width of the network."
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


def _numbered(unit: str, numbers: Sequence[int]) -> str:
    """`Level 3`, `Levels 0 to 4`, `Levels 1, 3 and 7`."""
    name, first, last = unit.capitalize(), numbers[0], numbers[-1]
    if len(numbers) == 1:
        return f"{name} {first}"
    if last - first == len(numbers) - 1:
        return f"{name}s {first} to {last}"
    return f"{name}s {', '.join(map(str, numbers[:-1]))} and {last}"


MOST_POINTS = 150  # of a curve; more are not visible and make the page large


def training_section(
    images_seen: Sequence[int],
    level_losses: Array,
    *,
    sigmas: Sequence[float],
    linear: Array,
    hints: Sequence[str] = (),
) -> Section:
    """The normalized losses of training [P, L], P >= 1, NaN where no image had that level; `hints` join its own.

    `sigmas` [L] are the middles of bins, descending; `linear` [L] is the loss there of the best linear denoiser.
    """
    seen, losses = thinned(np.asarray(images_seen, np.float64), level_losses)
    heat_map = loss_heat_map(seen, losses, sigmas=sigmas)
    curves = loss_curves(seen, losses, sigmas=sigmas)
    return Section(
        heading="Training",
        text="The loss at a noise level is the share of the added noise that the network fails to predict: 0 is "
        "perfect, and 1 means a network that always predicts zero. Strong noise is easy to tell from an image. Noise "
        "weaker than the detail of the images cannot be predicted, so the loss stays near 1 there.",
        plots=[
            Plot(to_svg(heat_map, salt="heat"), alt="Loss of each bin of noise over training, as a map"),
            Plot(to_svg(curves, salt="lines"), alt="Loss of each bin of noise over training, as curves"),
        ],
        hints=[*training_hints(last_losses(level_losses), linear=linear, sigmas=sigmas), *hints],
    )


def thinned(seen: Array, losses: Array) -> tuple[Array, Array]:
    """At most `MOST_POINTS` points: each is the mean of neighboring points, at the last of them."""
    parts = np.array_split(np.arange(len(seen)), min(len(seen), MOST_POINTS))
    known = np.isfinite(losses)
    sums = np.stack([np.where(known, losses, 0)[part].sum(axis=0) for part in parts])
    counts = np.stack([known[part].sum(axis=0) for part in parts])
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return seen[[part[-1] for part in parts]], means


# Of the median distance to the nearest training image, generated over real. Images of a good model are a little nearer
# than real ones, because they lack rare detail.
NEAR = 0.7

ADVICE = (
    "Add images, train with data.augmentation, or set data.horizontal_flip if mirrored images are still realistic; or "
    "train a smaller network, or for fewer train.num_images."
)


def overfitting_hints(curves: HeldOutCurves) -> list[str]:
    """A sentence if the held-out loss has risen since its lowest value."""
    if curves.lowest_at is None:
        return []
    return [f"The held-out loss was lowest at {curves.lowest_at:,} images: longer training memorizes. {ADVICE}"]


def copying_hints(generated: Mapping[str, Reading], real: Mapping[str, Reading], *, copies: str) -> list[str]:
    """Warnings that generated images are nearer to the training images than held-out images are.

    `generated` and `real` are metrics of the samples and of real test images; `copies` says how many copies there are,
    if they are more than chance explains.
    """
    hints = [f"The model memorizes training images. {copies}. {ADVICE}"] if copies else []
    if "nn_distance" in generated and "nn_distance" in real:
        own, others = generated["nn_distance"].value, real["nn_distance"].value
        if own < NEAR * others:
            hints.append(
                "The generated images are nearer to the training images than held-out images are: the median distance "
                f"to the nearest one is {own:,.0f}, and {others:,.0f} for held-out images."
            )
    return hints


def held_out_section(curves: HeldOutCurves) -> Section:
    """The curves of both losses."""
    figure = held_out_losses(curves.images_seen, curves.loss, curves.loss - curves.gap)
    return Section(
        heading="Held-out loss",
        text="The loss on test images, which training never uses, and on training images, both with the EMA weights "
        "and without augmentation. A model of the distribution has the same loss on both. One that memorizes its "
        "training images has a growing gap between the two, and in the end its held-out loss rises.",
        plots=[Plot(to_svg(figure, salt="held-out"), alt="Loss of held-out and of training images over training")],
        hints=overfitting_hints(curves),
    )


def search_section(result: Mapping[str, Any], plots: Sequence[bytes]) -> Section:
    """The search that the settings of a run come from: the result of its tune step, and its plots as PNG files."""
    best, baseline = result["objective"], result["baseline"]
    before = "" if baseline is None else f"; the original settings reached {baseline:.4g}"
    finished = sum(trial["status"] == "finished" for trial in result["trials"])
    return Section(
        heading="Search",
        text=f"The search started {len(result['trials'])} trials, and {finished} of them ran to the end. The best one "
        f"reached {result['objective_name']} = {best:.4g} after {result['images_seen']:,} images{before}. "
        "Lower is better.",
        pictures=[Picture(plot, alt="the trials of the search", width=820, pixelated=False) for plot in plots],
        table=[("setting", "best"), *((path, f"{value}") for path, value in result["values"].items())],
    )
