"""What the curves, settings and figures of a run say: its story, hints, quality, training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ncsn.config import Config
from ncsn.config.choices import AnnealedLangevinConfig, SamplerConfig
from ncsn.config.schema import TrainConfig
from ncsn.core.images import DataMoments
from ncsn.core.noise_schedule import best_epsilon, variance_ratio
from ncsn.data.format import Manifest
from ncsn.report.images import evenly_spread
from ncsn.report.page import Figures, Plot, Tile
from ncsn.report.plots import LevelLosses, NfeCurve, loss_curves, loss_heat_map, quality_versus_nfe
from ncsn.report.style import to_svg
from ncsn.report.words import Reading, read_figures
from ncsn.runs.costs import Prices, cost


@dataclass(frozen=True)
class Facts:
    """What the steps of a run left, as plain values.

    Attributes:
        config: The experiment.
        manifest: Its data set.
        images_seen: Training images consumed.
        nfe: Score-network evaluations per generated image.
        metrics: Figures of the samples.
        real_metrics: The same of real test images.
        classes: Kinds that the extractor tells apart; 0 if it is not known.
        decision: The registry's: `model`, `version`, `promoted`, `aliases`, `reason`; None if it was not asked.
    """

    config: Config
    manifest: Manifest
    images_seen: int
    nfe: int
    metrics: Mapping[str, float]
    real_metrics: Mapping[str, float]
    classes: int
    decision: Mapping[str, Any] | None = None


def lead(facts: Facts) -> list[str]:
    """Paragraphs: what was trained on what, how it draws, how good that is, what became of it."""
    manifest, levels = facts.manifest, facts.config.levels
    colour = "gray" if manifest.channels == 1 else "in colour"
    paragraphs = [
        f"A program looked at {manifest.count('train'):,} pictures and learned to make new ones like them: "
        f"{manifest.image_size} by {manifest.image_size} pixels, {colour}. The pictures are "
        f"“{manifest.source.rstrip('.')}”.",
        f"It is a noise conditional score network (Song & Ermon 2019). It was shown {facts.images_seen:,} images, "
        f"buried in one of {levels.num_levels} strengths of noise, and learned in which direction each pixel has "
        "to move to come out of it. To draw an image it starts from nothing but noise and follows that direction, "
        f"{facts.nfe:,} times.",
    ]
    return paragraphs + [text for text in (_verdict(facts), _decision(facts.decision)) if text]


def _verdict(facts: Facts) -> str:
    generated, real = read_figures(facts.metrics), read_figures(facts.real_metrics)
    if "score" not in generated or "score" not in real:
        return ""
    score, best = generated["score"], real["score"]
    scale = f" on a scale from 1 to {facts.classes}" if facts.classes else ""
    text = (
        f"How good are they? {extractor_phrase(score.extractor)} finds them clear and varied to a degree of "
        f"{score.value:.3g}{scale}; real images that the model has never seen reach {best.value:.3g}."
    )
    return f"{text} {_copies(generated['memorised'])}" if "memorised" in generated else text


def extractor_phrase(extractor: str) -> str:
    """Who looks at the images, as the subject of a sentence."""
    return {
        "classifier": "A classifier trained on the same labelled pictures",
        "inception": "The Inception network of 2015, which published scores use,",
    }.get(extractor, f"The extractor “{extractor}”")


def _copies(memorised: Reading) -> str:
    copies = round(memorised.value * memorised.num_images)
    found = {0: "none copies", 1: "one copies"}.get(copies, f"{copies} copy")
    return f"Of {memorised.num_images:,} that were compared with every training image, {found} one."


def _decision(decision: Mapping[str, Any] | None) -> str:
    if decision is None:
        return ""
    verb = "became the champion" if decision["promoted"] else "did not become the champion"
    return f"It is version {decision['version']} of {decision['model']} and {verb}: {decision['reason']}."


def tiles(facts: Facts) -> list[Tile]:
    """The numbers to see first."""
    generated, real = read_figures(facts.metrics), read_figures(facts.real_metrics)
    found = []
    if "score" in generated and "score" in real:
        share = generated["score"].value / real["score"].value
        beside = f"{generated['score'].value:.3g} against {real['score'].value:.3g}"
        found.append(Tile("clear and varied", f"{share:.0%}", f"of real images' score: {beside}"))
    if "fid" in generated:
        beside = f"real test images: {real['fid'].value:.3g}" if "fid" in real else "Fréchet distance"
        found.append(Tile("distance to real images", f"{generated['fid'].value:.3g}", f"{beside}; less is better"))
    if "memorised" in generated:
        copies = generated["memorised"]
        found.append(
            Tile("copies", f"{round(copies.value * copies.num_images)}", f"among {copies.num_images:,} samples")
        )
    found.append(Tile("network evaluations", f"{facts.nfe:,}", "per image (NFE)"))
    return found


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
