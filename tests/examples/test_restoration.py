"""Measurements of images, and samples given one: a correlated normal distribution, and all or nothing known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from inpaint_and_restore import (
    Diverged,
    KnownPixels,
    Observation,
    Operator,
    Variance,
    blur,
    gaussian_variance,
    means,
    peak_signal_to_noise,
    restored,
)
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.samplers.chain import sample
from ncsn.core.samplers.settings import DpmSolver, KarrasHeun, Sampler

RHO, KNOWN, HIGH, LOW = 0.8, 1.3, 40.0, 0.002
COVARIANCE = torch.tensor([[1.0, RHO], [RHO, 1.0]], dtype=torch.float64)
FIRST = KnownPixels(torch.tensor([[True, False]]))
SIGMAS = torch.tensor([HIGH, LOW], dtype=torch.float64)


class Pair:
    """Exact score of N(0, COVARIANCE) with noise, for images [B, 1, 1, 2]."""

    def __call__(self, x: Tensor, level: Tensor | None = None, *, sigma: Tensor | None = None) -> Tensor:
        sigma = SIGMAS[level] if sigma is None else sigma
        precision = torch.linalg.inv(COVARIANCE + float(sigma[0]) ** 2 * torch.eye(2))
        return -(x.flatten(1) @ precision.to(x)).view_as(x)


def exact_variance(sigma: float) -> float:
    """Of x1 given the noisy pair."""
    noisy = torch.linalg.inv(COVARIANCE + sigma**2 * torch.eye(2))
    return float((COVARIANCE - COVARIANCE @ noisy @ COVARIANCE)[0, 0])


def given(x: Tensor, variance: Variance, *, noise: float, sampler: Sampler) -> Tensor:
    observed = Observation(FIRST, torch.tensor([KNOWN, 0.0]).to(x).expand_as(x), noise)
    none = torch.zeros_like(x)
    return restored(Pair(), observed, variance, sampler=sampler, x=x, sigmas=SIGMAS, noise=lambda _: none, scale=1.0)


def moments(variance: Variance, *, noise: float, steps: int) -> tuple[float, float, float, float]:
    """Mean and variance of x2 and of x1 at the end; the chain is affine, so three starts tell its moments."""
    starts = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).view(3, 1, 1, 2)
    ends = given(starts, variance, noise=noise, sampler=KarrasHeun(num_steps=steps, denoise=False)).flatten(1)
    mean, linear = ends[0], (ends[1:] - ends[0]).T
    covariance = linear @ (COVARIANCE + HIGH**2 * torch.eye(2)) @ linear.T
    return float(mean[1]), float(covariance[1, 1]), float(mean[0]), float(covariance[0, 0])


@pytest.mark.parametrize(
    ("variance", "noise", "steps", "expected"),
    [
        (exact_variance, 0.1, 18, (1.0131, 0.3962)),
        (exact_variance, 0.1, 144, (1.0138, 0.3669, 1.2837, 0.00993)),
        (gaussian_variance(1.0), 0.1, 144, (0.9615, 0.3973, 1.2622, 0.01474)),
        (lambda _: 0.0, 0.1, 144, (1.4624, 0.2744)),
    ],
)
def test_moments_of_a_correlated_pair(variance, noise, steps, expected) -> None:
    found = moments(variance, noise=noise, steps=steps)
    digits = (6e-5, 6e-5, 6e-5, 6e-6)
    for value, wanted, tolerance in zip(found, expected, digits, strict=False):
        assert value == pytest.approx(wanted, abs=tolerance)


def test_a_likelihood_without_the_variance_of_the_image_diverges() -> None:
    start = HIGH * KeyedNoise(0, first=0, count=64, shape=(1, 1, 2))(0).double()
    with pytest.raises(Diverged):
        given(start, lambda _: 0.0, noise=0.1, sampler=KarrasHeun(num_steps=18))
    assert given(start, exact_variance, noise=0.1, sampler=KarrasHeun(num_steps=18)).abs().max() < 10


class Curved:
    """A score that is no linear function of x."""

    def __call__(self, x: Tensor, *, sigma: Tensor) -> Tensor:
        variance = sigma.square().view(-1, 1, 1, 1)
        return (torch.tanh(x / (1 + variance)) - x) / variance


@pytest.mark.parametrize("sampler", [KarrasHeun(num_steps=6), DpmSolver(num_steps=6), DpmSolver(num_steps=6, eta=1.0)])
def test_all_or_nothing_known(sampler: Sampler) -> None:
    noise = KeyedNoise(0, first=0, count=3, shape=(2, 4, 4))
    start, images, sigmas = HIGH * noise(7), noise(8), SIGMAS.float()

    def drawn(known: bool) -> Tensor:
        operator, r2 = KnownPixels(torch.full((4, 4), known)), gaussian_variance(1.0)
        seen = Observation(operator, operator.apply(images))
        return restored(Curved(), seen, r2, sampler=sampler, x=start, sigmas=sigmas, noise=noise, scale=1.0)

    assert torch.equal(drawn(True), images)
    assert torch.equal(drawn(False), sample(sampler, Curved(), x=start, sigmas=sigmas, noise=noise))


SIZE = HEIGHT, WIDTH = 12, 9


IMAGES = torch.rand(2, 2, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "operator",
    [KnownPixels(torch.arange(WIDTH) % 3 > 0), means(*SIZE, factor=3), blur(*SIZE, deviation=1.5)],
    ids=["pixels", "means", "blur"],
)
def test_the_adjoint_and_the_explanation_are_those_of_the_matrix(operator: Operator) -> None:
    basis = torch.eye(HEIGHT * WIDTH, dtype=torch.float64).view(-1, 1, *SIZE)
    a = operator.apply(basis).flatten(1).T
    y = operator.apply(IMAGES)
    torch.testing.assert_close(operator.adjoint(y).flatten(2), y.flatten(2) @ a)
    noise, spread = 0.01, 0.3
    whole = noise * torch.eye(len(a), dtype=torch.float64) + spread * a @ a.T
    expected = torch.linalg.solve(whole, y.flatten(2).flatten(0, 1).T).T @ a
    found = operator.explain(y, noise=noise, spread=spread)
    torch.testing.assert_close(found.flatten(2).flatten(0, 1), expected)


def test_blur_and_means_are_those_of_scipy_and_numpy() -> None:
    plane = IMAGES[0, 0].numpy()
    for deviation in (1.5, 5.0):  # the kernel of the second is wider than the image
        expected = gaussian_filter(plane, deviation, mode="reflect")
        np.testing.assert_allclose(blur(*SIZE, deviation=deviation).apply(IMAGES)[0, 0], expected, atol=1e-12)
    blocks = plane.reshape(4, 3, 3, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(means(*SIZE, factor=3).apply(IMAGES)[0, 0], blocks, atol=1e-12)


def test_signal_to_noise_of_known_errors() -> None:
    x = torch.zeros(4)
    assert peak_signal_to_noise(x, x) == math.inf
    assert peak_signal_to_noise(x, x + 0.1) == pytest.approx(20.0)
