"""Guidance on distributions whose scores are known: what it makes of them, in a band of noise levels."""

import math
from itertools import pairwise

import pytest
import torch

from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.samplers.chain import sample, spaced_sigmas, visited
from ncsn.core.samplers.guidance import AtLevels, Guided, band_on_grid
from ncsn.core.samplers.settings import AnnealedLangevin, DpmSolver, KarrasHeun, Langevin

HIGH = 80.0
BAND = (0.19, 1.61)
ENDS = (HIGH, BAND[1], BAND[0], 0.002)
EVERYWHERE = (0.0, math.inf)


def gaussians(analytic, sigmas, *, weight, band) -> Guided:
    """A class of deviation 0.5 among images of deviation 1."""
    network, guide = analytic.GaussianScore(sigmas, s2=0.25), analytic.GaussianScore(sigmas, s2=1.0)
    return Guided(network, guide, weight=weight, band=band_on_grid(*band, sigmas.tolist()))


def spread(guided, sigmas, *, sampler) -> float:
    """The deviation at the end of the flow, which is linear, of a start of deviation HIGH."""
    start = torch.tensor([HIGH, -HIGH], dtype=torch.float64).view(2, 1, 1, 1)
    ends = sample(sampler, guided, x=start, sigmas=sigmas, noise=None).flatten()
    return float(ends[0] - ends[1]) / 2


@pytest.mark.parametrize(
    ("weight", "band", "expected"),
    [(1, EVERYWHERE, 0.500003), (2, EVERYWHERE, 0.250013), (3, EVERYWHERE, 0.125015), (2, BAND, 0.295378)],
)
def test_deviation_of_a_guided_gaussian(analytic, weight, band, expected):
    parts = [torch.logspace(*map(math.log10, ends), 400, dtype=torch.float64) for ends in pairwise(ENDS)]
    sigmas = torch.cat([parts[0], *(part[1:] for part in parts[1:])])
    sampler = DpmSolver(num_levels=len(sigmas), spacing="geometric", denoise=False)
    guided = gaussians(analytic, sigmas, weight=weight, band=band)
    assert spread(guided, sigmas, sampler=sampler) == pytest.approx(expected, abs=2e-5)


SAMPLERS = [
    AnnealedLangevin(epsilon=1e-4, steps_per_level=2),
    Langevin(step_size=1e-3, num_steps=5),
    KarrasHeun(num_steps=6, churn=3.0),
    DpmSolver(num_steps=7),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.kind)
def test_weight_one_is_the_network_and_weight_zero_the_guide_bitwise(sampler, analytic):
    sigmas = torch.tensor([1.0, 0.3, 0.09, 0.027])
    network, guide = analytic.GaussianScore(sigmas, s2=0.25), analytic.GaussianScore(sigmas, s2=1.0)

    def sampled(score):
        noise = KeyedNoise(0, first=0, count=3, shape=(1, 2, 2))
        return sample(sampler, score, x=noise(10_000), sigmas=sigmas, noise=noise)

    def guided(weight):
        return sampled(Guided(network, guide, weight=weight, band=EVERYWHERE))

    assert torch.equal(guided(1.0), sampled(network)) and guide.calls == 0
    assert torch.equal(guided(0.0), sampled(guide))
    assert not torch.equal(guided(2.0), sampled(network))


def test_a_step_stays_with_the_score_of_its_start(analytic):
    """Else Heun's order falls to 1 where the band begins and ends."""
    found = []
    for share in (640, 20, 40, 80):
        sampler, sigmas = KarrasHeun(num_steps=3 * share + 1, denoise=False), torch.tensor([8.0, 0.02]).double()
        grid = torch.tensor(visited(sampler, sigmas), dtype=torch.float64)
        guided = gaussians(analytic, grid, weight=3, band=(float(grid[2 * share]), float(grid[share])))
        found.append(spread(guided, sigmas, sampler=sampler))
    errors = [abs(each / found[0] - 1) for each in found[1:]]
    assert [one / other for one, other in pairwise(errors)] == pytest.approx([4, 4], abs=0.6)


def test_ends_of_a_band_move_to_the_grid():
    grid = spaced_sigmas(torch.tensor([80.0, 0.002], dtype=torch.float64), 18, spacing="karras")

    def inside(low: float, high: float) -> list[float]:
        low, high = band_on_grid(low, high, grid)
        return [sigma for sigma in grid if low < float(torch.tensor(sigma)) <= high]  # a float32 is on its side too

    assert inside(0.0, 80.0) == inside(0.001, 1e4) == grid
    assert inside(grid[10], grid[4]) == inside(grid[10] * 1.05, grid[4] * 0.95) == grid[4:10]
    assert inside(grid[17], grid[4]) == grid[4:17]
    assert inside(0.0, grid[17]) == grid[17:]
    assert inside(grid[5] * 1.01, grid[5] * 1.02) == []
    assert band_on_grid(0.1, 2.0, [1.0]) == (0.0, math.inf)


def test_a_guide_of_other_levels_is_asked_at_the_sigma(analytic):
    sigmas = torch.tensor([1.0, 0.1], dtype=torch.float64)
    network, guide = analytic.GaussianScore(sigmas, s2=1.0), analytic.GaussianScore(torch.tensor([9.0]), s2=1.0)
    guided = Guided(network, AtLevels(guide, sigmas), weight=3.0, band=EVERYWHERE)
    x, level = torch.ones(2, 1, 1, 1, dtype=torch.float64), torch.tensor([1, 1])
    torch.testing.assert_close(guided.field_at(0.1)(x, level), network(x, level))
