"""Multistep samplers: the tables of section 6 of the second specification (errors, orders, variances), and resets."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.samplers.multistep import DpmSolver, UniPC, midpoint_weights, step_weights
from ncsn.core.samplers.ode import KarrasHeun, ProbabilityFlow
from ncsn.core.samplers.stochastic import PredictorCorrector

# (spacing, sigma_1, sigma_L) -> points -> relative error of Heun, 2M, UniPC-2, UniPC-3; pixels in [-1, 1].
WIDE, EVEN, NARROW = ("karras", 80.0, 0.002), ("geometric", 80.0, 0.002), ("karras", 5.0, 0.05)
ERRORS = {
    WIDE: {
        6: (7.061e-1, 1.540e-2, -7.447e-3, 9.441e-1),
        10: (2.196e-1, 1.588e-1, 1.615e-1, 3.107e-1),
        18: (5.528e-2, 6.231e-2, 4.760e-2, -5.370e-2),
        36: (1.222e-2, 1.311e-2, 5.243e-3, -1.880e-3),
        72: (2.879e-3, 2.976e-3, 6.128e-4, -1.128e-4),
        144: (6.990e-4, 7.102e-4, 7.390e-5, -6.832e-6),
    },
    EVEN: {
        10: (2.387e-1, 4.044e-2, 5.397e-2, 5.983e-2),
        18: (5.737e-2, 2.065e-2, 1.616e-2, 2.658e-3),
        36: (1.239e-2, 5.551e-3, 2.203e-3, -1.112e-4),
        72: (2.892e-3, 1.383e-3, 2.733e-4, -1.459e-5),
    },
    NARROW: {
        18: (8.788e-3, 8.046e-3, 2.737e-3, -4.605e-4),
        36: (2.018e-3, 1.872e-3, 3.196e-4, -3.636e-5),
        72: (4.843e-4, 4.483e-4, 3.837e-5, -2.370e-6),
        144: (1.186e-4, 1.096e-4, 4.694e-6, -1.495e-7),
    },
}


def ends(grid, unit=1.0):
    return torch.tensor(grid[1:], dtype=torch.float64) * unit


def solvers(spacing, count):
    heun = KarrasHeun(num_steps=count, denoise=False) if spacing == "karras" else ProbabilityFlow(denoise=False)
    shape = {"num_steps": count, "spacing": spacing, "denoise": False}
    return heun, DpmSolver(**shape), UniPC(order=2, **shape), UniPC(order=3, **shape)


def errors(grid, count, analytic, unit=1.0):
    """Relative errors of the end points on Gaussian data of deviation 0.5, from an exact start."""
    found, s = [], 0.5 * unit
    for sampler in solvers(grid[0], count):
        sigmas = ends(grid, unit)
        if isinstance(sampler, ProbabilityFlow):
            sigmas = torch.logspace(math.log10(sigmas[0]), math.log10(sigmas[1]), count, dtype=torch.float64)
        network = analytic.GaussianScore(sigmas, s2=s**2)
        start = torch.full((1, 1, 1, 1), math.hypot(s, sigmas[0]), dtype=torch.float64)
        x = sampler(network, x=start, sigmas=sigmas, noise=None)
        found.append(x.item() / math.hypot(s, sigmas[-1]) - 1)
    return found


@pytest.mark.parametrize(("grid", "count"), [(grid, count) for grid, table in ERRORS.items() for count in table])
def test_errors_on_gaussian_data_are_those_of_the_table(grid, count, analytic):
    found = errors(grid, count, analytic)
    assert found == pytest.approx(ERRORS[grid][count], rel=0.01)
    # The same in pixels in [0, 1], where every sigma is half.
    assert errors(grid, count, analytic, unit=0.5) == pytest.approx(found, rel=1e-6)


def test_orders_of_convergence(analytic):
    coarse, fine = (errors(NARROW, count, analytic) for count in (72, 144))
    ratios = [a / b for a, b in zip(coarse, fine, strict=True)]
    assert ratios == pytest.approx([4.08, 4.09, 8.17, 15.9], rel=5e-3)


def test_the_first_order_of_the_sde_is_the_ancestral_sampler(analytic):
    sigmas = geometric_sigmas(5.0, 0.05, 12).double()
    noise = KeyedNoise(0, first=0, count=2, shape=(1, 2, 2))
    arguments = {"x": 5 * noise(99).double(), "sigmas": sigmas, "noise": lambda k: noise(k).double()}
    ancestral = PredictorCorrector(predictor="ancestral", corrector_steps=0)
    found = DpmSolver(num_levels=12, order=1, eta=1.0)(analytic.GaussianScore(sigmas, s2=0.25), **arguments)
    expected = ancestral(analytic.GaussianScore(sigmas, s2=0.25), **arguments)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


VARIANCES = {
    (WIDE, 1, 1.0): {18: 0.5413, 36: 0.7244, 72: 0.8478, 144: 0.9198},
    (WIDE, 2, 1.0): {10: 1.3615, 18: 1.2798, 36: 1.0704, 72: 1.0160, 144: 1.0038},
    (WIDE, 2, 0.5): {10: 1.3792, 18: 1.2137, 36: 1.0475, 72: 1.0107, 144: 1.0025},
    (NARROW, 2, 1.0): {18: 1.0411, 36: 1.0099, 72: 1.0024},
}


@pytest.mark.parametrize(("grid", "order", "eta"), VARIANCES)
def test_variances_of_the_sde_are_those_of_the_table(grid, order, eta, analytic):
    # UnitNoise carries the weight of every draw, so this is the exact variance, without random numbers.
    for count, expected in VARIANCES[grid, order, eta].items():
        noise, sigmas = analytic.UnitNoise(count + 1), ends(grid)
        sampler = DpmSolver(num_steps=count, order=order, eta=eta, denoise=False)
        x = sampler(
            analytic.GaussianScore(sigmas, s2=0.25),
            x=noise.start(math.hypot(0.5, sigmas[0])),
            sigmas=sigmas,
            noise=noise,
        )
        assert x.square().sum().item() / (0.25 + float(sigmas[1]) ** 2) == pytest.approx(expected, abs=6e-5)
        assert noise.asked == list(range(count - 1)), "none in the denoising step"


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("order", [1, 2])
def test_on_a_point_mass_each_level_has_its_variance(order, eta, analytic):
    noise, sigmas, seen = analytic.UnitNoise(11), ends(WIDE), []
    sampler = DpmSolver(num_steps=10, order=order, eta=eta)
    x = sampler(
        analytic.GaussianScore(sigmas, s2=0.0),
        x=noise.start(80.0),
        sigmas=sigmas,
        noise=noise,
        on_level=lambda _, state: seen.append(state.square().sum().item()),
    )
    assert seen == pytest.approx([sigma**2 for sigma in sampler.visited(sigmas)], rel=1e-12)
    assert x.abs().max() < 1e-14


@pytest.mark.parametrize(
    "sampler", [DpmSolver(denoise=False), UniPC(order=2, denoise=False), UniPC(order=3, denoise=False)], ids=repr
)
def test_a_point_mass_is_solved_exactly(sampler, analytic):
    sigmas = ends(NARROW)
    network = analytic.GaussianScore(sigmas, s2=0.0, mean=0.3)
    start = torch.tensor([4.0, -7.0], dtype=torch.float64).view(2, 1, 1, 1)
    x = sampler(network, x=start, sigmas=sigmas, noise=None)
    torch.testing.assert_close(x, 0.3 + (start - 0.3) * 0.05 / 5.0, rtol=0, atol=1e-14)


class Polynomial:
    """A denoised image that is a polynomial in t = -ln sigma and does not depend on x."""

    def __init__(self, *coefficients):
        self.p = np.polynomial.Polynomial(coefficients)

    def score_at(self, x, sigma):
        return (self.p(-sigma[0].log().item()) - x) / sigma.view(-1, 1, 1, 1) ** 2

    def exact(self, x, sigma, lower):
        """x at `lower`: D - D' + D'' - ... is a particular solution of dx / dt = D - x."""
        particular = sum(self.p.deriv(k) * (-1) ** k if k else self.p for k in range(4))
        return particular(-math.log(lower)) + (x - particular(-math.log(sigma))) * lower / sigma


def largest_error_of_a_step(sampler, network, first):
    seen, sigmas = [], ends(("geometric", 5.0, 0.05))
    start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    sampler(network, x=start, sigmas=sigmas, noise=None, on_level=lambda _, x: seen.append(x.item()))
    visited = sampler.visited(sigmas)
    steps = zip(itertools.pairwise(seen), itertools.pairwise(visited), strict=True)
    return max([abs(after - network.exact(x, *levels)) for (x, after), levels in steps][first:])


def test_polynomials_are_integrated_exactly():
    shape = {"num_steps": 9, "spacing": "geometric"}
    line, square, cube = Polynomial(0.3, 0.7), Polynomial(0.3, 0.7, -0.4), Polynomial(0.3, 0.7, -0.4, 0.2)
    assert largest_error_of_a_step(UniPC(order=2, **shape), square, first=1) < 4e-15
    assert largest_error_of_a_step(UniPC(order=3, **shape), cube, first=2) < 4e-15
    assert largest_error_of_a_step(UniPC(order=2, **shape), cube, first=1) > 1e-5
    # 2M takes phi_0 h / 2 for phi_1.
    h = math.log(100) / 8
    phi_0 = 1 - math.exp(-h)
    expected = 0.7 * (h - phi_0 - phi_0 * h / 2)
    assert largest_error_of_a_step(DpmSolver(**shape), line, first=1) == pytest.approx(expected, rel=1e-9)
    assert expected == pytest.approx(0.0084, abs=5e-5)


@pytest.mark.parametrize("h", [1e-3, 0.04, 0.06, 0.7, 4.0, 12.0])
@pytest.mark.parametrize("nodes", [(0.0, -1.3, -2.1), (1.0, 0.0, -1.3), (1.0, 0.0, -0.8, -2.1)])
def test_weights_of_a_step_have_the_moments_phi(h, nodes):
    nodes = [h * node for node in nodes]
    weights = step_weights(h, nodes)
    for k in range(len(nodes)):
        # phi_k as a series of positive terms: the recursion cancels where h is small.
        phi = math.exp(-h) * sum(h ** (k + 1 + m) / (math.factorial(m) * (k + 1 + m)) for m in range(100))
        assert sum(w * node**k for w, node in zip(weights, nodes, strict=True)) == pytest.approx(phi, rel=1e-12)


def test_two_values_are_weighed_in_the_middle_of_the_step():
    h, before = 0.6, 0.4
    r = before / h
    phi_0 = 1 - math.exp(-h)
    assert step_weights(h, [0.0, -before]) == pytest.approx([phi_0 * (1 + 1 / (2 * r)), -phi_0 / (2 * r)], rel=1e-13)
    assert step_weights(h, [h, 0.0]) == pytest.approx([phi_0 / 2, phi_0 / 2], rel=1e-13)
    assert midpoint_weights(h, [0.0], 0.8) == [0.8]


MULTISTEP = [
    DpmSolver(num_steps=9),
    DpmSolver(num_steps=9, eta=1.0),
    DpmSolver(num_steps=9, order=1),
    UniPC(num_steps=9, order=2),
    UniPC(num_steps=9, order=3),
]


@pytest.mark.parametrize("sampler", MULTISTEP, ids=repr)
def test_a_sampler_remembers_nothing_of_its_last_run(sampler, analytic):
    sigmas = ends(NARROW).float()

    def run(chosen, index):
        noise = KeyedNoise(3, first=index, count=2, shape=(1, 2, 2))
        network = analytic.GaussianScore(sigmas, s2=0.1 * (1 + index))
        return chosen(network, x=5 * noise(99), sigmas=sigmas, noise=noise)

    fresh = [run(type(sampler)(**vars(sampler)), index) for index in (0, 1)]
    assert all(map(torch.equal, fresh, [run(sampler, 0), run(sampler, 1)]))


@pytest.mark.parametrize("sampler", MULTISTEP, ids=repr)
@pytest.mark.parametrize("spacing", ["geometric", "karras"])
def test_networks_that_know_their_own_levels_are_asked_at_these(sampler, spacing, analytic):
    sigmas = geometric_sigmas(5.0, 0.05, 41).double()
    network = analytic.GaussianScore(sigmas, s2=0.25)
    own = type(sampler)(**vars(sampler) | {"num_levels": 21, "spacing": spacing, "denoise": False})
    visited, x = own.visited(sigmas), torch.full((1, 1, 1, 1), 6.0, dtype=torch.float64)
    assert set(visited) <= set(sigmas.tolist()) and len(visited) <= 21
    noise = KeyedNoise(0, first=0, count=1, shape=(1, 1, 1))
    by_level = own(analytic.ByLevelOnly(network), x=x, sigmas=sigmas, noise=noise)
    assert network.calls == own.num_evaluations(41) - (21 - len(visited))
    if spacing == "geometric":
        free = type(sampler)(**vars(own) | {"num_levels": None, "num_steps": 21})
        assert by_level.item() == pytest.approx(free(network, x=x, sigmas=sigmas, noise=noise).item(), rel=1e-6)
    with pytest.raises(ValueError, match="ByLevelOnly"):
        sampler(analytic.ByLevelOnly(network), x=x, sigmas=sigmas, noise=noise)


class TwoFields:
    """The exact score of one Gaussian above a sigma, and of another below it."""

    def __init__(self, analytic, *, boundary):
        self.above, self.below = analytic.GaussianScore(None, s2=1.0), analytic.GaussianScore(None, s2=0.25)
        self.boundary = boundary

    def field_at(self, sigma):
        return self.above if sigma > self.boundary else self.below

    def score_at(self, x, sigma):
        return self.field_at(sigma[0].item()).score_at(x, sigma)


@pytest.mark.parametrize("sampler", [each for each in MULTISTEP if not getattr(each, "eta", 0)], ids=repr)
def test_the_history_ends_where_the_score_becomes_another(sampler, analytic):
    sampler = type(sampler)(**vars(sampler) | {"denoise": False})
    sigmas, start = ends(NARROW), torch.full((1, 1, 1, 1), 6.0, dtype=torch.float64)
    visited, seen = sampler.visited(sigmas), []
    network = TwoFields(analytic, boundary=visited[4] * (1 + 1e-9))
    x = sampler(network, x=start, sigmas=sigmas, noise=None, on_level=lambda _, state: seen.append(state))

    def stretch(x, levels, score):
        own = type(sampler)(**vars(sampler) | {"num_levels": len(levels)})
        return own(score, x=x, sigmas=torch.tensor(levels, dtype=torch.float64), noise=None)

    above = analytic.GaussianScore(torch.tensor(visited[:4], dtype=torch.float64), s2=1.0)
    below = analytic.GaussianScore(torch.tensor(visited[4:], dtype=torch.float64), s2=0.25)
    assert torch.equal(stretch(start, visited[:4], above), seen[3])
    assert torch.equal(stretch(seen[4], visited[4:], below), x)


def test_two_fields_are_solved_one_after_the_other(analytic):
    sigmas, start = ends(NARROW), torch.full((1, 1, 1, 1), 6.0, dtype=torch.float64)
    for sampler in (DpmSolver(num_steps=73, denoise=False), UniPC(num_steps=73, order=3, denoise=False)):
        joint = sampler.visited(sigmas)[40]
        x = sampler(TwoFields(analytic, boundary=joint), x=start, sigmas=sigmas, noise=None)
        exact = 6.0 * math.hypot(1.0, joint) / math.hypot(1.0, 5.0) * math.hypot(0.5, 0.05) / math.hypot(0.5, joint)
        assert x.item() == pytest.approx(exact, rel=2e-3)
