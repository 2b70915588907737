"""Interpolation by mixed noise: its ends are the two images, and every mixture is standard normal."""

from __future__ import annotations

import math

import pytest
import torch

from ncsn.core.keyed_random import InterpolatedNoise, KeyedNoise
from ncsn.core.langevin import annealed_langevin
from ncsn.core.noise_schedule import geometric_sigmas

SIGMAS = geometric_sigmas(1.0, 0.01, 4)


def source(index, shape=(1, 3, 3)):
    return KeyedNoise(0, first=index, count=1, shape=shape)


def test_mixture_runs_from_one_noise_to_the_other_on_the_circle():
    z = InterpolatedNoise(source(0), source(1), count=3)(4)
    p, q = source(0)(4)[0], source(1)(4)[0]
    assert torch.equal(z[0], p) and torch.equal(z[2], q)
    torch.testing.assert_close(z[1], (p + q) / math.sqrt(2))


def test_every_mixture_is_standard_normal():
    z = InterpolatedNoise(source(0, (1, 200, 200)), source(1, (1, 200, 200)), count=5)(0)
    for image in z:
        assert abs(image.mean().item()) < 0.02 and image.var().item() == pytest.approx(1, abs=0.03)


def test_ends_of_the_interpolation_are_the_images_themselves():
    def run(noise, x):
        return annealed_langevin(
            lambda x, level: torch.sin(4 * x) - x / SIGMAS[level].view(-1, 1, 1, 1) ** 2,
            x=x,
            sigmas=SIGMAS,
            epsilon=2e-5,
            steps_per_level=2,
            noise=noise,
            denoise=True,
        )

    start = source(0).uniform(0)
    path = run(InterpolatedNoise(source(0), source(1), count=4), start.expand(4, 1, 3, 3))
    assert torch.equal(path[:1], run(source(0), start)) and torch.equal(path[-1:], run(source(1), start))


def test_uniform_draws_are_shared():
    x = InterpolatedNoise(source(0), source(1), count=3).uniform(0)
    assert x.shape == (3, 1, 3, 3) and all(torch.equal(image, source(0).uniform(0)[0]) for image in x)


def test_bad_interpolations_are_refused():
    with pytest.raises(ValueError, match="count = 1"):
        InterpolatedNoise(source(0), source(1), count=1)
    two = KeyedNoise(0, first=0, count=2, shape=(1, 3, 3))
    with pytest.raises(ValueError, match=r"draw for one image, got shapes \[2, 1, 3, 3\] and \[1, 1, 3, 3\]"):
        InterpolatedNoise(two, source(1), count=2)
    with pytest.raises(ValueError, match=r"got shapes \[1, 1, 3, 3\] and \[1, 1, 3, 4\]"):
        InterpolatedNoise(source(0), source(1, (1, 3, 4)), count=2)
