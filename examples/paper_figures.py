"""The pictures that papers show of a score network.

They are its chain over the noise levels, interpolations, the nearest training images, and with `--full` the quality of
samplers over the number of their network evaluations (NFE). Quality is the Fréchet distance of the pixels to the
training images. A small set says little of it: each point is the mean over five sets of 2,560, with the standard
deviation.

    python examples/paper_figures.py --full --out figures.png
"""

from __future__ import annotations

import math
from statistics import mean, stdev

import torch
from matplotlib.figure import Figure
from small_images import Images, Model, arguments, digits, show, train
from torch import Tensor

from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.samplers.chain import sample, start
from ncsn.core.samplers.settings import AnnealedLangevin, DpmSolver, KarrasHeun, Sampler
from ncsn.evaluation.frechet import FrechetStatistics, frechet_distance

HEUN = KarrasHeun(num_steps=18)
LANGEVIN = AnnealedLangevin(epsilon=3e-5, steps_per_level=10)
ROWS = 6
COUNT = 2560  # samples of a set
SETS = 5  # for a point of quality


def chain(model: Model, *, rows: int = ROWS) -> Tensor:
    """The state of annealed Langevin dynamics after each noise level, [levels + 1, rows, 1, H, W]."""
    noise = KeyedNoise(0, first=0, count=rows, shape=model.moments.mean.shape)
    sigmas = model.network.sigmas
    states = [start(LANGEVIN, model.moments, sigma_1=float(sigmas[0]), noise=noise)]

    def keep(_: int, x: Tensor) -> None:
        states.append(x.clone())

    sample(LANGEVIN, model.network, x=states[0], sigmas=sigmas, noise=noise, on_level=keep)
    return torch.stack(states)


def interpolations(model: Model, *, rows: int = ROWS, columns: int = 9) -> Tensor:
    """Images between two samples, by mixing their noise (NCSNv2), [rows, columns, 1, H, W].

    cos(phi) z_p + sin(phi) z_q is standard normal for every phi, and runs from z_p to z_q. The start of a chain is a
    linear function of its noise.
    """
    moments, sigmas = model.moments, model.network.sigmas
    phi = torch.linspace(0, math.pi / 2, columns).view(-1, 1, 1, 1)
    found = []
    for row in range(rows):
        noises = [KeyedNoise(0, first=first, count=1, shape=moments.mean.shape) for first in (2 * row, 2 * row + 1)]
        p, q = (start(HEUN, moments, sigma_1=float(sigmas[0]), noise=noise) - moments.mean for noise in noises)
        x = moments.mean + phi.cos() * p + phi.sin() * q
        found.append(sample(HEUN, model.network, x=x, sigmas=sigmas, noise=noises[0]))  # not drawn
    return torch.stack(found)


def neighbors(model: Model, images: Images, *, rows: int = ROWS, columns: int = 8) -> Tensor:
    """Samples, each with its nearest training images by pixels, [rows, 1 + columns, 1, H, W]."""
    samples = model.sample(rows, sampler=HEUN)
    nearest = torch.cdist(samples.flatten(1), images.train.flatten(1)).topk(columns, largest=False).indices
    return torch.cat([samples[:, None], images.train[nearest]], dim=1)


def statistics(images: Tensor) -> FrechetStatistics:
    """Mean and covariance of the pixels times ten, a scale on which the distances are a few units."""
    return FrechetStatistics.of(10 * images.clamp(0, 1).flatten(1).numpy())


def quality(model: Model, images: Images) -> dict[str, dict[int, tuple[float, float]]]:
    """Sampler -> NFE -> mean and standard deviation of the Fréchet distance over the sets of samples."""
    levels = len(model.network.sigmas)
    real = statistics(images.train)
    samplers: dict[str, list[Sampler]] = {
        "Heun": [KarrasHeun(num_steps=n) for n in (5, 9, 18)],
        "DPM-Solver++(2M)": [DpmSolver(num_steps=n) for n in (9, 17, 35)],
        "annealed Langevin": [AnnealedLangevin(epsilon=3e-5, steps_per_level=n) for n in (2, 5, 10)],
    }
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for name, chains in samplers.items():
        for sampler in chains:
            made = (model.sample(COUNT, seed=seed, sampler=sampler) for seed in range(SETS))
            distances = [frechet_distance(statistics(x), real) for x in made]
            nfe = sampler.num_evaluations(levels)
            found.setdefault(name, {})[nfe] = mean(distances), stdev(distances)
            print(f"{name:18} NFE {nfe:3d}: {mean(distances):6.2f} +- {stdev(distances):.2f}")
    return found


def main() -> None:
    given = arguments(__doc__, out="figures.png")
    images = digits()
    model = train(images, num_images=140_000 if given.full else 30_000)
    figure = Figure(figsize=(14, 8), layout="constrained")
    (first, second), (third, fourth) = figure.subplots(2, 2)
    show(first, chain(model).transpose(0, 1), "annealed Langevin: the start, then the state after each noise level")
    show(second, interpolations(model), "interpolated noise")
    show(third, neighbors(model, images), "samples (first column) and their nearest training images")
    if given.full:
        print("Fréchet distance of pixels, with the standard deviation over sets of samples")
        for name, points in quality(model, images).items():
            distances, spreads = zip(*points.values(), strict=True)
            fourth.errorbar(list(points), distances, yerr=spreads, marker="o", capsize=3, label=name)
        fourth.set(xscale="log", yscale="log", xlabel="NFE", ylabel="Fréchet distance of pixels")
        fourth.set_title("quality over cost")
        fourth.legend()
    else:
        fourth.set_axis_off()
    figure.savefig(given.out, dpi=110)


if __name__ == "__main__":
    main()
