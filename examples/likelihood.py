"""Bits per dimension of test images under a trained network, by the probability-flow ODE (Song et al. 2021).

Gray values are made continuous by uniform noise, so the figure is an upper bound of the bits that a code for the images
needs. It is compared with two models that need no network: independent uniform pixels, and a normal distribution with
the mean and covariance of the training images.

    python examples/likelihood.py --out likelihood.png
"""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from small_images import Model, arguments, digits, train
from torch import Tensor

from ncsn.core.likelihood import HIGHEST_SIGMA, LikelihoodOde, hutchinson_probes

GRAYS = 17  # of scikit-learn's digits: 0, 1, ..., 16


def bits(log_density: Tensor, size: int) -> Tensor:
    """Bits per dimension [N] of images (k + u) / GRAYS of `size` pixels, from the log density at them."""
    return math.log2(GRAYS) - log_density / (size * math.log(2))


def dequantized(images: Tensor, generator: torch.Generator) -> Tensor:
    """Gray values k / 16 as (k + u) / 17 with uniform u, [N, 1, H, W]."""
    return ((images * (GRAYS - 1)).round() + torch.rand(images.shape, generator=generator)) / GRAYS


def network_bits(model: Model, x: Tensor, *, steps: int, probes: int) -> Tensor:
    """Bits per dimension [N] of continuous images, measured one by one."""
    ode = LikelihoodOde(model.network.sigma_data, sigma_min=float(model.network.sigmas[-1]), steps=steps)
    v = hutchinson_probes(0, first=0, count=len(x), number=probes, shape=x.shape[1:])
    return bits(ode.log_density(model.network.score_at, x, probes=v), x[0].numel())


def normal_bits(training: Tensor, x: Tensor) -> Tensor:
    """Bits per dimension [N] under the normal distribution with the moments of the training images."""
    flat = training.flatten(1).double()
    covariance = flat.T.cov() + 1e-6 * torch.eye(flat.shape[1])
    normal = torch.distributions.MultivariateNormal(flat.mean(dim=0), covariance)
    return bits(normal.log_prob(x.flatten(1).double()), flat.shape[1])


def main() -> None:
    given = arguments(__doc__, out="likelihood.png")
    generator = torch.Generator().manual_seed(0)
    images = digits()
    model = train(images, num_images=140_000 if given.full else 40_000)
    x = dequantized(images.test[: 500 if given.full else 100], generator)
    found = {
        "network": network_bits(model, x, steps=64 if given.full else 32, probes=4 if given.full else 1),
        "normal distribution": normal_bits(dequantized(images.train, generator), x),
    }
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, values in found.items():
        axes.hist(values.numpy(), bins=30, alpha=0.6, label=f"{name}: {float(values.mean()):.2f}")
        error = float(values.std()) / math.sqrt(len(values))
        print(f"{name:20} {float(values.mean()):.3f} +- {error:.3f} bits per dimension (deviation over other images)")
    print(f"sigma from {float(model.network.sigmas[-1]):g} to {HIGHEST_SIGMA:g}, {len(x)} test images")
    axes.axvline(math.log2(GRAYS), color="gray", label=f"uniform pixels: {math.log2(GRAYS):.2f}")
    axes.set(xlabel="bits per dimension of a test image", ylabel="images")
    axes.legend()
    figure.savefig(given.out, dpi=110)


if __name__ == "__main__":
    main()
