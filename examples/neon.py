"""Neon: better samples of few steps by training on one's own samples, and going the other way (2510.03597).

A sampler of few steps misses a part of the distribution that the network knows. Training on such samples moves the
weights away from the data. So the first weights theta_r and those after the self-training theta_s give better ones at
theta_r - w (theta_s - theta_r). Samples of one seed are trained on, those of a second choose w, and those of a third
are measured.

The measure is the Fréchet distance of the pixels themselves, which for images of 8x8 pixels says enough. It is larger
for fewer images, so what is compared has as many images as the test set, whose digits are of other writers.

    python examples/neon.py --out neon.png
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from matplotlib.figure import Figure
from small_images import Images, Model, arguments, digits, statistics, train

from ncsn.core.samplers.settings import KarrasHeun
from ncsn.evaluation.frechet import FrechetStatistics, frechet_distance

FEW_STEPS = KarrasHeun(num_steps=5)
MULTIPLES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
TO_TRAIN, TO_CHOOSE, TO_MEASURE = 1, 2, 3  # seeds


def lowest_point(values: Mapping[float, float]) -> float:
    """Where a function of one minimum is least, from its values at some places.

    The vertex of the parabola through the least value and its two neighbors; at an end of the places, that end.
    """
    places = sorted(values)
    least = min(range(len(places)), key=lambda index: values[places[index]])
    if least in (0, len(places) - 1):
        return places[least]
    a, b, c = places[least - 1 : least + 2]
    left, right = (values[b] - values[a]) / (b - a), (values[c] - values[b]) / (c - b)
    bend = (right - left) / (c - a)
    return b if bend <= 0 else (a + b) / 2 - left / (2 * bend)


def moved(model: Model, self_trained: Model, w: float) -> Model:
    """The model with weights theta_r - w (theta_s - theta_r): theta_r for w = 0, theta_s for w = -1, bit by bit."""
    network = copy.deepcopy(model.network)
    theta_s = dict(self_trained.network.named_parameters())
    with torch.no_grad():
        for name, theta_r in network.named_parameters():
            theta_r.lerp_(theta_s[name], -w)
    return Model(network, model.moments)


def distance(model: Model, real: FrechetStatistics, *, seed: int, count: int) -> float:
    return frechet_distance(statistics(model.sample(count, seed=seed, sampler=FEW_STEPS)), real)


def main() -> None:
    given = arguments(__doc__, out="neon.png")
    num_images, count = (140_000, 5000) if given.full else (40_000, 1000)
    images = digits()
    real = statistics(images.train)
    base = train(images, num_images=num_images)
    own = base.sample(len(images.train), seed=TO_TRAIN, sampler=FEW_STEPS).clamp(0, 1)
    # A short training at a low rate: the change of the weights is a direction, not a destination.
    self_trained = train(
        Images(own, own), num_images=round(0.06 * num_images), start=base, learning_rate=2e-4, seed=TO_TRAIN
    )
    distances = {w: distance(moved(base, self_trained, w), real, seed=TO_CHOOSE, count=count) for w in MULTIPLES}
    w = lowest_point(distances)
    best = moved(base, self_trained, w)
    few = len(images.test)
    measured = {
        f"w = 0, {few} samples": distance(base, real, seed=TO_MEASURE, count=few),
        f"w = {w:.2f}, {few} samples": distance(best, real, seed=TO_MEASURE, count=few),
        f"{few} real images of other writers": frechet_distance(statistics(images.test), real),
    }
    for name, value in measured.items():
        print(f"{name:32} Fréchet distance of pixels {value:.3f}")
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(MULTIPLES, list(distances.values()), "o-")
    axes.set(xlabel="w", ylabel="Fréchet distance of pixels", title="weights moved away from the self-training")
    axes.text(0.5, 0.9, "\n".join(f"{name}: {value:.2f}" for name, value in measured.items()),
              transform=axes.transAxes, ha="center", va="top")  # fmt: skip
    figure.savefig(given.out, dpi=110)


if __name__ == "__main__":
    main()
