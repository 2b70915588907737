"""Densities by the probability-flow ODE where they are known, traces, and the bits of gray values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ncsn.core.likelihood import LikelihoodOde, ScoreAt, hutchinson_probes


def basis(x: Tensor) -> Tensor:
    """Probes that give the trace exactly."""
    size = x[0].numel()
    return (math.sqrt(size) * torch.eye(size, dtype=x.dtype)).view(size, 1, *x.shape[1:]).expand(size, *x.shape)


def gaussian(s: float) -> ScoreAt:
    """Of data N(0.5, s^2)."""
    return lambda x, sigma: (0.5 - x) / (s**2 + sigma.square().view(-1, 1, 1, 1))


def points(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


@pytest.mark.parametrize("steps", [1, 7])
def test_data_of_the_right_spread_have_their_density_at_any_step_count(steps: int) -> None:
    x = points(0.5, 0.75, 1.0)
    ode = LikelihoodOde(sigma_data=0.25, sigma_min=0.001, steps=steps)
    found = ode.log_density(gaussian(0.25), x, probes=basis(x))
    expected = torch.tensor([0.4673478, -0.0326442, -1.5326202], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-8)
    exact = -0.5 * (x.flatten() - 0.5).square() / (0.25**2 + 1e-6) - 0.5 * math.log(2 * math.pi * (0.25**2 + 1e-6))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)  # the prior at sigma 40 is that of data of this spread


@pytest.mark.parametrize(
    ("s", "errors"),
    [(0.5, (4.8e-4, 3.0e-5, 8.0e-7)), (0.125, (1.1e-3, 3.6e-5, 1.4e-6)), (0.02, (1.1e-2, 8.6e-4, 5.6e-5))],
)
def test_other_data_have_the_errors_of_the_table(s: float, errors: tuple[float, ...]) -> None:
    x = points(0.5 + s)
    for steps, error in zip((9, 18, 36), errors, strict=True):
        ode = LikelihoodOde(sigma_data=0.25, sigma_min=0.001, steps=steps)
        found = float(ode.log_density(gaussian(s), x, probes=basis(x)))
        variance = s**2 + ode.sigma_min**2
        exact = -0.5 * s**2 / variance - 0.5 * math.log(2 * math.pi * variance)
        assert abs(found - exact) / math.log(2) == pytest.approx(error, rel=0.05)


def test_a_mixture_of_two_points_has_its_density() -> None:
    centers, ode = torch.tensor([[-0.5, 0.2], [0.5, -0.2]], dtype=torch.float64), LikelihoodOde(0.25, 0.05, 72)

    def log_density(x: Tensor, variance: Tensor) -> Tensor:
        squares = (x.flatten(1)[:, None] - (centers + 1) / 2).square().sum(2)
        return torch.logsumexp(-squares / (2 * variance[:, None]), 1) - torch.log(4 * math.pi * variance)

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        weights = (
            -(x.flatten(1)[:, None] - (centers + 1) / 2).square().sum(2) / (2 * sigma.square()[:, None])
        ).softmax(1)
        return ((weights @ ((centers + 1) / 2) - x.flatten(1)) / sigma.square()[:, None]).view(x.shape)

    x = torch.tensor([[0.3, 0.6], [0.2, 0.55], [0.7, 0.4], [0.5, 0.5]], dtype=torch.float64).view(4, 1, 1, 2)
    expected = log_density(x, torch.full((4,), 0.05**2, dtype=torch.float64))
    torch.testing.assert_close(ode.log_density(score, x, probes=basis(x)), expected, rtol=0, atol=1e-4)


def test_traces_by_random_signs() -> None:
    v = hutchinson_probes(0, first=5, count=4, number=2, shape=(1, 8, 8))
    assert v.shape == (2, 4, 1, 8, 8) and set(v.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close((v * (3 * v)).flatten(2).sum(2), torch.full((2, 4), 192.0))  # exact for 3 I
    torch.testing.assert_close(hutchinson_probes(0, first=7, count=1, number=2, shape=(1, 8, 8))[:, 0], v[:, 2])
    matrix = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    v = hutchinson_probes(0, first=0, count=4096, number=1, shape=(8,))[0]
    found = ((v @ matrix) * v).sum(1)
    assert abs(float(found.mean() - matrix.trace())) < 4 * float(found.std()) / 64
