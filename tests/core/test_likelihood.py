"""Densities by the probability-flow ODE where they are known, traces, and the bits of gray values."""

import math

import pytest
import torch
from torch import Tensor

from ncsn.core.likelihood import LikelihoodOde, hutchinson_probes


def basis(x: Tensor) -> Tensor:
    """Probes that give the trace exactly."""
    size = x[0].numel()
    return (math.sqrt(size) * torch.eye(size, dtype=x.dtype)).view(size, 1, *x.shape[1:]).expand(size, *x.shape)


@pytest.mark.parametrize(
    ("s", "errors"), [(0.25, (0, 0, 0)), (0.5, (4.8e-4, 3.0e-5, 8.0e-7)), (0.02, (1.1e-2, 8.6e-4, 5.6e-5))]
)
def test_gaussian_data_have_the_errors_of_the_table(s: float, errors: tuple[float, ...]) -> None:
    """None where the spread is `sigma_data`, since the prior at sigma 40 is that of such data."""
    x = torch.full((1, 1, 1, 1), 0.5 + s, dtype=torch.float64)

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        return (0.5 - x) / (s**2 + sigma.square().view(-1, 1, 1, 1))

    for steps, error in zip((9, 18, 36), errors, strict=True):
        ode = LikelihoodOde(sigma_data=0.25, sigma_min=0.001, steps=steps)
        variance = s**2 + ode.sigma_min**2
        exact = -0.5 * s**2 / variance - 0.5 * math.log(2 * math.pi * variance)
        found = float(ode.log_density(score, x, probes=basis(x)))
        assert abs(found - exact) / math.log(2) == pytest.approx(error, rel=0.05, abs=2e-9)


def test_a_mixture_of_two_points_has_its_density() -> None:
    centers = torch.tensor([[0.25, 0.6], [0.75, 0.4]], dtype=torch.float64)

    def exponents(x: Tensor, sigma: Tensor) -> Tensor:
        return -(x.flatten(1)[:, None] - centers).square().sum(2) / (2 * sigma.square()[:, None])

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        means = exponents(x, sigma).softmax(1) @ centers
        return ((means - x.flatten(1)) / sigma.square()[:, None]).view(x.shape)

    x = torch.tensor([[0.3, 0.6], [0.2, 0.55], [0.7, 0.4], [0.5, 0.5]], dtype=torch.float64).view(4, 1, 1, 2)
    sigma = torch.full((4,), 0.05, dtype=torch.float64)
    expected = torch.logsumexp(exponents(x, sigma), 1) - torch.log(4 * math.pi * sigma.square())
    found = LikelihoodOde(sigma_data=0.25, sigma_min=0.05, steps=72).log_density(score, x, probes=basis(x))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_traces_by_random_signs() -> None:
    v = hutchinson_probes(0, first=5, count=4, number=2, shape=(1, 8, 8))
    assert v.shape == (2, 4, 1, 8, 8) and set(v.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(hutchinson_probes(0, first=7, count=1, number=2, shape=(1, 8, 8))[:, 0], v[:, 2])
    matrix = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    v = hutchinson_probes(0, first=0, count=4096, number=1, shape=(8,))[0]
    found = ((v @ matrix) * v).sum(1)
    assert abs(float(found.mean() - matrix.trace())) < 4 * float(found.std()) / 64
