"""Probability-flow samplers: spec oracle 10 (errors on Gaussian data and their orders)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.samplers.ode import KarrasHeun, ProbabilityFlow

S, MEAN = 0.5, 0.3


def exact_sigmas(high, low, count):
    return torch.logspace(math.log10(high), math.log10(low), count, dtype=torch.float64)


def relative_error(sampler, high, low, count, analytic):
    """Error of the map from sigma `high` to `low`: x - mean shrinks by the ratio of total deviations."""
    sigmas = exact_sigmas(high, low, count)
    network = analytic.GaussianScore(sigmas, s2=S**2, mean=MEAN)
    start = torch.full((1, 1, 1, 1), MEAN + math.hypot(S, high), dtype=torch.float64)
    x = sampler(network, x=start, sigmas=sigmas, noise=None)
    return (x.item() - MEAN) / math.hypot(S, low) - 1


EULER_50 = {10: -0.211, 19: -0.112, 37: -0.0574, 73: -0.0291, 145: -0.0147, 232: -0.0092}
HEUN_50 = {10: 0.145, 19: 0.0317, 37: 0.0074, 73: 0.0018, 145: 0.00044, 232: 0.00017}
EULER_1 = {10: -0.0975, 19: -0.0499, 37: -0.0253, 73: -0.0127}
HEUN_1 = {10: 0.0224, 19: 0.0054, 37: 0.0013, 73: 0.0003}


@pytest.mark.oracle(10)
@pytest.mark.parametrize(
    ("method", "high", "table", "order"),
    [("euler", 50, EULER_50, 2), ("heun", 50, HEUN_50, 4), ("euler", 1, EULER_1, 2), ("heun", 1, HEUN_1, 4)],
)
def test_errors_on_gaussian_data_and_their_order(method, high, table, order, analytic):
    sampler = ProbabilityFlow(method=method, denoise=False)
    errors = {n: relative_error(sampler, high, 0.01, n, analytic) for n in table}
    for n, expected in table.items():
        # The table has two or three digits; half of its last digit on top of 1 %.
        digit = 10.0 ** (-len(str(expected).rstrip("0").split(".")[1]))
        assert errors[n] == pytest.approx(expected, rel=0.01, abs=0.51 * digit)
    fine = [n for n in (19, 37, 73, 145) if n in errors]
    for coarse, finer in pairwise(fine):
        assert errors[coarse] / errors[finer] == pytest.approx(order, abs={2: 0.15, 4: 0.5}[order])


@pytest.mark.parametrize("lam", [0.01, 1.0, 60.0])
def test_variances_of_the_19_evaluation_sampler_are_those_of_the_table(lam, analytic):
    expected = {("euler", 0.01): 0.778, ("euler", 1.0): 0.880, ("euler", 60.0): 0.996}
    expected |= {("heun", 0.01): 1.075, ("heun", 1.0): 1.016, ("heun", 60.0): 1.000}
    sigmas = exact_sigmas(1.0, 0.01, 10)
    for method in ("euler", "heun"):
        network = analytic.GaussianScore(sigmas, s2=lam)
        start = torch.full((1, 1, 1, 1), math.sqrt(lam + 1), dtype=torch.float64)
        x = ProbabilityFlow(method=method, denoise=False)(network, x=start, sigmas=sigmas, noise=None)
        assert x.item() ** 2 / (lam + 1e-4) == pytest.approx(expected[method, lam], abs=1e-3)
        network.calls = 0
        denoised = ProbabilityFlow(method=method)(network, x=start, sigmas=sigmas, noise=None)
        assert denoised.item() == pytest.approx(x.item() * lam / (lam + 1e-4), rel=1e-9)
        assert network.calls == {"euler": 10, "heun": 19}[method]


def test_heun_is_one_hand_worked_step(analytic):
    sigmas = torch.tensor([2.0, 1.0], dtype=torch.float64)
    network = analytic.GaussianScore(sigmas, s2=1.0)
    x = ProbabilityFlow(denoise=False)(network, x=torch.full((1, 1, 1, 1), 5.0).double(), sigmas=sigmas, noise=None)
    # d1 = -2 * (-5 / 5) = 2; Euler: 3; d2 = -1 * (-3 / 2) = 1.5; Heun: 5 - (2 + 1.5) / 2.
    assert x.item() == pytest.approx(3.25, rel=1e-12)


def test_subset_of_a_fine_schedule_equals_the_coarse_schedule(analytic):
    fine, coarse = exact_sigmas(50, 0.01, 37), exact_sigmas(50, 0.01, 10)
    start = torch.linspace(-60, 60, 12, dtype=torch.float64).view(3, 1, 2, 2)
    results = [
        ProbabilityFlow(num_levels=10)(analytic.GaussianScore(s, s2=0.25), x=start, sigmas=s, noise=None)
        for s in (fine, coarse)
    ]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_karras_heun_of_18_steps_is_accurate_on_gaussian_data(analytic):
    errors = {}
    for steps in (18, 36, 72):
        errors[steps] = relative_error(KarrasHeun(num_steps=steps, denoise=False), 50, 0.01, 10, analytic)
    assert abs(errors[18]) < 0.04 and errors[36] / errors[72] == pytest.approx(4, abs=0.5)
    assert KarrasHeun(num_steps=18).num_evaluations(10) == 35


def test_churn_keeps_the_variance_and_uses_its_noise(analytic):
    sigmas = exact_sigmas(10, 0.01, 10)
    generator = torch.Generator().manual_seed(0)
    start = math.sqrt(100 + S**2) * torch.randn(4000, 1, 1, 4, generator=generator, dtype=torch.float64)
    asked = []

    def noise(step):
        asked.append(step)
        return torch.randn(start.shape, generator=generator, dtype=torch.float64)

    network = analytic.GaussianScore(sigmas, s2=S**2)
    x = KarrasHeun(num_steps=40, churn=10.0, churn_min=0.05, churn_max=5.0)(
        network, x=start, sigmas=sigmas, noise=noise
    )
    assert x.std().item() == pytest.approx(S, rel=0.03)
    assert 0 < len(asked) < 39 and asked == sorted(set(asked))
    correlation = torch.corrcoef(torch.stack((x.flatten(), start.flatten())))[0, 1]
    assert correlation < 0.9, "churn replaces part of what the start determined"
    still = KarrasHeun(num_steps=40)(network, x=start, sigmas=sigmas, noise=None)
    assert torch.corrcoef(torch.stack((still.flatten(), start.flatten())))[0, 1] > 0.9999


def test_karras_heun_needs_a_continuous_network(analytic):
    sigmas = geometric_sigmas(1.0, 0.01, 10)
    network = analytic.ByLevelOnly(analytic.GaussianScore(sigmas, s2=1.0))
    with pytest.raises(ValueError, match="ncsnv2, unet or ddpmpp"):
        KarrasHeun()(network, x=torch.zeros(1, 1, 2, 2), sigmas=sigmas, noise=None)
