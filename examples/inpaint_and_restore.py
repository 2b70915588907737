"""Complete and restore images with a network that was trained on clean ones only.

Algorithm 2 of Song & Ermon (2019) completes images by annealed Langevin dynamics: known pixels are set at each step to
the image plus the level's noise. Pseudo-inverse guidance (Song et al. 2023) draws images given any linear measurement
y = A x + sigma_y n, with any sampler: it adds J^T A^T (sigma_y^2 I + r^2 A A^T)^-1 (y - A D) to the score, for the
denoised image D with derivative J. Its r^2 takes pixels for independent, so the images spread less than they should; on
a correlated Gaussian their mean is off by 0.4 to 0.5 standard deviations of the posterior.

    python examples/inpaint_and_restore.py --out restored.png
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from restoration import (
    KnownPixels,
    Observation,
    Operator,
    blur,
    gaussian_variance,
    means,
    peak_signal_to_noise,
    restored,
)
from small_images import Images, Model, arguments, digits, fashion, train
from torch import Tensor
from torch.nn.functional import interpolate

from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.samplers.chain import start
from ncsn.core.samplers.langevin import inpaint
from ncsn.core.samplers.settings import KarrasHeun


@dataclass(frozen=True)
class Outcome:
    """One task."""

    name: str
    given: Tensor  # as an image [N, 1, H, W]: with 0.5 at unknown pixels, enlarged, or blurred
    made: Tensor  # [N, 1, H, W]
    simple: Tensor  # an answer that needs no network


def complete(model: Model, images: Tensor, mask: Tensor) -> Tensor:
    """Algorithm 2: images [N, 1, H, W] whose unknown pixels, where mask [H, W] is False, are drawn."""
    noise = KeyedNoise(0, first=0, count=len(images), shape=images.shape[1:])
    sigmas = model.network.sigmas
    # The step at each level is epsilon sigma^2 / sigma_L^2, so this is a fifth of sigma^2.
    epsilon = 0.2 * float(sigmas[-1]) ** 2
    return inpaint(
        model.network,
        x=noise.uniform(0),
        reference=images,
        mask=mask,
        sigmas=sigmas,
        epsilon=epsilon,
        steps_per_level=20,
        noise=noise,
    )


def restore(model: Model, y: Tensor, operator: Operator, *, sigma_y: float, steps: int = 30) -> Tensor:
    """Images [N, 1, H, W] that fit the measurement y = A x + sigma_y n."""
    shape = model.moments.mean.shape
    noise = KeyedNoise(0, first=0, count=len(y), shape=shape)
    sampler, sigmas = KarrasHeun(num_steps=steps), model.network.sigmas
    return restored(
        model.network,
        Observation(operator, y, noise=sigma_y),
        gaussian_variance(model.network.sigma_data),
        sampler=sampler,
        x=start(sampler, model.moments, sigma_1=float(sigmas[0]), noise=noise),
        sigmas=sigmas,
        noise=noise,
        scale=1.0,
    )


def run_tasks(model: Model, truth: Tensor) -> list[Outcome]:
    """All tasks on the same test images [N, 1, H, W]."""
    size = truth.shape[-1]
    mean = model.moments.mean

    left = torch.zeros(size, size, dtype=torch.bool)
    left[:, : size // 2] = True
    box = torch.ones(size, size, dtype=torch.bool)
    box[size // 4 : -size // 4, size // 4 : -size // 4] = False
    outcomes = [
        Outcome("right half, Algorithm 2", torch.where(left, truth, 0.5), complete(model, truth, left),
                torch.where(left, truth, mean)),
        Outcome("square, guided", torch.where(box, truth, 0.5),
                restore(model, torch.where(box, truth, 0.0), KnownPixels(box), sigma_y=0.0),
                torch.where(box, truth, mean)),
    ]  # fmt: skip
    # A quarter of the pixels, each the mean of four; and an image blurred and noisy.
    generator = torch.Generator().manual_seed(0)
    shrunk, blurred = means(size, size, factor=2), blur(size, size, deviation=0.8)
    for name, operator, sigma_y in (("half the size", shrunk, 0.0), ("blur and noise", blurred, 0.05)):
        y = operator.apply(truth)
        y = y + sigma_y * torch.randn(y.shape, generator=generator)
        shown = interpolate(y, size=(size, size)) if y.shape[-1] < size else y
        smooth = interpolate(y, size=(size, size), mode="bilinear") if y.shape[-1] < size else y
        outcomes.append(Outcome(name, shown, restore(model, y, operator, sigma_y=sigma_y), smooth))
    return outcomes


def draw(outcomes: list[Outcome], truth: Tensor, path: str, *, shown: int = 12) -> None:
    """A panel for each task: what is given, what is made, the truth."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, outcome in zip(figure.subplots(2, 2).flat, outcomes, strict=True):
        rows = [torch.cat(list(images[:shown, 0]), dim=1) for images in (outcome.given, outcome.made, truth)]
        axes.imshow(torch.cat(rows).clamp(0, 1), cmap="gray", vmin=0, vmax=1)
        size = truth.shape[-1]
        axes.set_yticks([size / 2 + size * row for row in range(3)], ["given", "made", "truth"])
        axes.set(xticks=[], title=outcome.name)
    figure.savefig(path, dpi=110)


def main() -> None:
    given = arguments(__doc__, out="restored.png")
    images: Images = fashion(given.data) if given.full else digits()
    widths = (32, 64, 96) if given.full else (32, 64)
    model = train(images, num_images=100_000 if given.full else 40_000, widths=widths)
    truth = images.test[:32]
    outcomes = run_tasks(model, truth)
    for outcome in outcomes:
        made, simple = (peak_signal_to_noise(x.clamp(0, 1), truth) for x in (outcome.made, outcome.simple))
        print(f"{outcome.name:25} PSNR {made:5.1f} dB, without a network {simple:5.1f} dB")
    draw(outcomes, truth, given.out)


if __name__ == "__main__":
    main()
