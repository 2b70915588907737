"""Langevin dynamics: spec oracles 6 (stationary variance), 8 (point mass: the step convention) and determinism."""

import math

import pytest
import torch

from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.noise_schedule import geometric_sigmas, variance_ratio
from ncsn.core.samplers.langevin import annealed_langevin, langevin_step

SIGMAS = geometric_sigmas(1.0, 0.01, 10)


@pytest.mark.oracle(6)
@pytest.mark.parametrize("step_size", [0.02, 0.2, 0.5, 1.0])
def test_stationary_variance_of_a_standard_normal(step_size):
    x, generator = torch.zeros(200_000), torch.Generator().manual_seed(1)
    for _ in range(math.ceil(3 / step_size)):
        x = langevin_step(x, score=-x, step_size=step_size, z=torch.randn(x.shape, generator=generator))
    assert x.var().item() == pytest.approx(2 / (2 - step_size), rel=0.02)


@pytest.mark.oracle(8)
@pytest.mark.parametrize(("epsilon", "ratio"), [(2e-5, 10 / 9), (1e-5, 20 / 19)])
def test_point_mass_tells_the_full_step_from_the_half_step(epsilon, ratio, analytic):
    # The chain is linear, so the squared weights of its draws are the variance, without the noise of an estimate.
    noise, sigmas = analytic.UnitNoise(1001), SIGMAS.double()
    x = annealed_langevin(
        analytic.GaussianScore(sigmas, s2=0.0),
        x=noise.start(1.0),
        sigmas=sigmas,
        epsilon=epsilon,
        steps_per_level=100,
        noise=noise,
        denoise=False,
    )
    assert x.square().sum().item() / float(sigmas[-1]) ** 2 == pytest.approx(ratio, rel=1e-6)


def test_consistent_steps_keep_each_levels_noise(analytic):
    noise, sigmas, seen = analytic.UnitNoise(51), SIGMAS.double(), []
    ratio = float(sigmas[0] / sigmas[1])
    # So that the excess of a level's variance over sigma^2, which each step multiplies by (1 - r)^2, falls to 1/1000.
    epsilon = float(sigmas[-1]) ** 2 * (1 - (1e-3 / (ratio**2 - 1)) ** (0.5 / 5))
    annealed_langevin(
        analytic.GaussianScore(sigmas, s2=0.0),
        x=noise.start(ratio * float(sigmas[0])),
        sigmas=sigmas,
        epsilon=epsilon,
        steps_per_level=5,
        noise=noise,
        denoise=False,
        consistent=True,
        on_level=lambda level, x: seen.append(x.square().sum().item() / float(sigmas[level]) ** 2),
    )
    # A thousandth is left of the level before, and a little of that of the levels before it.
    assert seen[0] == pytest.approx(1.001, rel=1e-9) and max(seen) < 1.0011
    plain = variance_ratio(epsilon, sigma_L=float(sigmas[-1]), ratio=ratio, steps_per_level=5)
    assert plain > 1.2, "plain steps of that size leave a fifth more"


@pytest.mark.oracle(8)
def test_denoising_brings_a_point_mass_home(analytic):
    noise, sigmas = KeyedNoise(0, first=0, count=200, shape=(1, 10, 10)), SIGMAS.double()
    clean, noisy = (
        annealed_langevin(
            analytic.GaussianScore(sigmas, s2=0.0, mean=0.3),
            x=noise.uniform(0).double(),
            sigmas=sigmas,
            epsilon=2e-5,
            steps_per_level=40,
            noise=lambda step: noise(step).double(),
            denoise=denoise,
        )
        for denoise in (True, False)
    )
    assert (clean - 0.3).abs().max() < 1e-7
    assert noisy.mean().item() == pytest.approx(0.3, abs=2e-4) and noisy.std().item() > 0.009
