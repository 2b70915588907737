"""Samplers: spec oracles 10 and 12, the tables of section 6 of the second specification, what all share, and levels."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.samplers.chain import choose_levels, sample, spaced_sigmas, visited
from ncsn.core.samplers.settings import AnnealedLangevin, Consistency, DpmSolver, KarrasHeun, Langevin
from ncsn.errors import UserError

SIGMAS = geometric_sigmas(1.0, 0.01, 10).double()
SAMPLERS = [
    Langevin(level=9, num_steps=4),
    AnnealedLangevin(steps_per_level=2),
    AnnealedLangevin(steps_per_level=2, denoise=False),
    AnnealedLangevin(steps_per_level=2, consistent=True),
    KarrasHeun(num_steps=5),
    KarrasHeun(num_steps=5, churn=3.0, denoise=False),
    DpmSolver(num_steps=5),
    DpmSolver(num_levels=6, spacing="geometric", eta=1.0, denoise=False),
    Consistency(sigmas=(0.3,)),
    Consistency(steps=3, sigmas=(0.3, 0.1), denoise=False),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_every_sampler_keeps_the_convention(sampler, analytic):
    def run(first, count):
        noise = KeyedNoise(3, first=first, count=count, shape=(2, 3, 4))
        network = analytic.GaussianScore(SIGMAS.float(), s2=torch.tensor(0.1, requires_grad=True), mean=0.5)
        start, seen = noise.uniform(0), []
        before = start.clone()
        x = sample(
            sampler, network, x=start, sigmas=SIGMAS.float(), noise=noise, on_level=lambda k, state: seen.append(k)
        )
        assert torch.equal(start, before), "the start is not changed"
        assert network.calls == sampler.num_evaluations(10), "NFE"
        assert seen == list(range(len(visited(sampler, SIGMAS)))) and seen
        assert x.shape == start.shape and x.dtype == torch.float32 and not x.requires_grad
        return x

    whole = run(0, 7)
    assert torch.isfinite(whole).all()
    assert torch.equal(whole, torch.cat([run(0, 2), run(2, 4), run(6, 1)])), "an image is the same in every batch"


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (AnnealedLangevin, "steps_per_level", 0),
        (AnnealedLangevin, "epsilon", math.nan),
        (Langevin, "level", 10_000),
        (DpmSolver, "order", 3),
        *((Consistency, "sigmas", value) for value in ((0.3, 0.1), (0.0,), (math.inf,), 0.3, ("0.3",))),
        (Consistency, "steps", 17),
    ],
)
def test_settings_out_of_range_are_refused_where_they_are_made(kind, field, value):
    with pytest.raises(UserError) as refused:
        kind(**{field: value})
    assert refused.value.keys == [field]


def test_langevin_at_one_level_reaches_its_variance(analytic):
    noise = KeyedNoise(0, first=0, count=50, shape=(1, 20, 20))
    network, target = analytic.GaussianScore(SIGMAS.float(), s2=0.04), 0.04 + 0.01**2
    arguments = {"x": 0.2 * noise(1000), "sigmas": SIGMAS.float(), "noise": noise}
    x = sample(Langevin(level=-1, step_size=8e-3, num_steps=40, denoise=False), network, **arguments)
    assert x.var().item() == pytest.approx(target * 2 / (2 - 8e-3 / target), rel=0.03)
    with pytest.raises(ValueError, match=r"\b9\b.*\b10\b"):
        sample(Langevin(level=10, num_steps=1), network, **arguments)


def weights(x):
    return x.square().sum().item()


# (spacing, sigma_1, sigma_L) -> points -> relative errors of Heun and 2M; pixels in [-1, 1].
WIDE, EVEN, NARROW = ("karras", 80.0, 0.002), ("geometric", 80.0, 0.002), ("karras", 5.0, 0.05)
ERRORS = {
    WIDE: {6: (7.061e-1, 1.540e-2), 18: (5.528e-2, 6.231e-2), 144: (6.990e-4, 7.102e-4)},
    EVEN: {10: (None, 4.044e-2), 72: (None, 1.383e-3)},
    NARROW: {18: (8.788e-3, 8.046e-3), 144: (1.186e-4, 1.096e-4)},
}


def ends(grid, unit=1.0):
    return torch.tensor(grid[1:], dtype=torch.float64) * unit


def errors(grid, count, analytic, unit=1.0):
    """Relative errors of the end points on Gaussian data of deviation 0.5, from an exact start."""
    s, sigmas = 0.5 * unit, ends(grid, unit)
    network = analytic.GaussianScore(sigmas, s2=s**2)
    start = torch.full((1, 1, 1, 1), math.hypot(s, sigmas[0]), dtype=torch.float64)
    samplers = KarrasHeun(num_steps=count, denoise=False), DpmSolver(num_steps=count, spacing=grid[0], denoise=False)
    found = [sample(each, network, x=start, sigmas=sigmas, noise=None).item() for each in samplers]
    return [end / math.hypot(s, sigmas[-1]) - 1 for end in found]


@pytest.mark.oracle(10)
@pytest.mark.parametrize(("grid", "count"), [(grid, count) for grid, table in ERRORS.items() for count in table])
def test_errors_on_gaussian_data_are_those_of_the_table(grid, count, analytic):
    found = errors(grid, count, analytic)
    scaled = errors(grid, count, analytic, unit=0.5)  # in pixels in [0, 1], where every sigma is half
    for value, half, expected in zip(found, scaled, ERRORS[grid][count], strict=True):
        if expected is not None:
            assert value == pytest.approx(expected, rel=0.01) and half == pytest.approx(value, rel=1e-6)


def test_churn_keeps_the_variance_and_uses_its_noise(analytic):
    sigmas, s = torch.tensor([10.0, 0.01], dtype=torch.float64), 0.5
    generator, asked = torch.Generator().manual_seed(0), []
    start = math.sqrt(100 + s**2) * torch.randn(4000, 1, 1, 4, generator=generator, dtype=torch.float64)

    def noise(step):
        asked.append(step)
        return torch.randn(start.shape, generator=generator, dtype=torch.float64)

    def correlation(sampler, noise):
        x = sample(sampler, analytic.GaussianScore(sigmas, s2=s**2), x=start, sigmas=sigmas, noise=noise)
        assert x.std().item() == pytest.approx(s, rel=0.03)
        return torch.corrcoef(torch.stack((x.flatten(), start.flatten())))[0, 1]

    churned = correlation(KarrasHeun(num_steps=40, churn=10.0), noise)
    assert asked == list(range(39))
    assert churned < 0.9, "churn replaces part of what the start determined"
    assert correlation(KarrasHeun(num_steps=40), None) > 0.9999


VARIANCES = {
    (WIDE, 1, 1.0): {18: 0.5413, 144: 0.9198},
    (WIDE, 2, 1.0): {10: 1.3615, 144: 1.0038},
    (WIDE, 2, 0.5): {10: 1.3792, 144: 1.0025},
    (NARROW, 2, 1.0): {18: 1.0411, 72: 1.0024},
}


@pytest.mark.parametrize(("grid", "order", "eta"), VARIANCES)
def test_variances_of_the_sde_are_those_of_the_table(grid, order, eta, analytic):
    # UnitNoise carries the weight of every draw, so this is the exact variance, without random numbers.
    for count, expected in VARIANCES[grid, order, eta].items():
        noise, sigmas = analytic.UnitNoise(count + 1), ends(grid)
        sampler = DpmSolver(num_steps=count, order=order, eta=eta, denoise=False)
        network, start = analytic.GaussianScore(sigmas, s2=0.25), noise.start(math.hypot(0.5, sigmas[0]))
        x = sample(sampler, network, x=start, sigmas=sigmas, noise=noise)
        assert weights(x) / (0.25 + float(sigmas[1]) ** 2) == pytest.approx(expected, abs=6e-5)
        assert noise.asked == list(range(count - 1)), "none in the denoising step"


@pytest.mark.oracle(12)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("order", [1, 2])
def test_on_a_point_mass_each_level_has_its_variance(order, eta, analytic):
    noise, sigmas, seen = analytic.UnitNoise(11), ends(WIDE), []
    sampler = DpmSolver(num_steps=10, order=order, eta=eta)
    x = sample(
        sampler,
        analytic.GaussianScore(sigmas, s2=0.0),
        x=noise.start(80.0),
        sigmas=sigmas,
        noise=noise,
        on_level=lambda _, state: seen.append(weights(state)),
    )
    assert seen == pytest.approx([sigma**2 for sigma in visited(sampler, sigmas)], rel=1e-12)
    assert x.abs().max() < 1e-14


@pytest.mark.parametrize("spacing", ["geometric", "karras"])
@pytest.mark.parametrize("sampler", [DpmSolver(), DpmSolver(eta=1.0), DpmSolver(order=1)], ids=repr)
def test_networks_that_know_their_own_levels_are_asked_at_these(sampler, spacing, analytic):
    sigmas = geometric_sigmas(5.0, 0.05, 41).double()
    network = analytic.GaussianScore(sigmas, s2=0.25)
    own = replace(sampler, num_levels=21, spacing=spacing, denoise=False)
    levels, x = visited(own, sigmas), torch.full((1, 1, 1, 1), 6.0, dtype=torch.float64)
    arguments = {"x": x, "sigmas": sigmas, "noise": KeyedNoise(0, first=0, count=1, shape=(1, 1, 1))}
    assert set(levels) <= set(sigmas.tolist()) and len(levels) <= 21
    by_level = sample(own, lambda x, level: network(x, level), **arguments)  # it takes no sigma
    assert network.calls == own.num_evaluations(41) - (21 - len(levels))
    if spacing == "geometric":
        free = replace(own, num_levels=None, num_steps=21)
        assert by_level.item() == pytest.approx(sample(free, network, **arguments).item(), rel=1e-6)


def test_the_history_ends_where_the_score_becomes_another(analytic):
    sampler = DpmSolver(num_steps=9, denoise=False)
    sigmas, start = ends(NARROW), torch.full((1, 1, 1, 1), 6.0, dtype=torch.float64)
    levels, seen = visited(sampler, sigmas), []
    above, below = analytic.GaussianScore(None, s2=1.0), analytic.GaussianScore(None, s2=0.25)
    network = SimpleNamespace(field_at=lambda sigma: above if sigma > levels[4] * (1 + 1e-9) else below)
    x = sample(sampler, network, x=start, sigmas=sigmas, noise=None, on_level=lambda _, state: seen.append(state))

    def stretch(x, part, s2):
        part = torch.tensor(part, dtype=torch.float64)
        own = replace(sampler, num_levels=len(part))
        return sample(own, analytic.GaussianScore(part, s2=s2), x=x, sigmas=part, noise=None)

    assert torch.equal(stretch(start, levels[:4], 1.0), seen[3])
    assert torch.equal(stretch(seen[4], levels[4:], 0.25), x)


@settings(deadline=None)
@given(sigmas=st.lists(st.integers(1, 500), min_size=2, unique=True), count=st.integers(2, 60))
def test_any_subset_of_levels_descends_between_both_ends(sigmas, count):
    sigmas, last = torch.tensor(sorted(sigmas, reverse=True), dtype=torch.float64), len(sigmas) - 1
    for spacing in ("geometric", "karras"):
        indices = choose_levels(sigmas, count, spacing=spacing)
        assert indices == sorted(set(indices)) and (indices[0], indices[-1]) == (0, last)
        assert len(indices) <= count and (len(indices) == min(count, last + 1) or spacing == "karras")
    assert choose_levels(sigmas, None) == list(range(last + 1))


def test_a_subset_is_nearest_to_the_grid_of_its_spacing():
    sigmas = geometric_sigmas(50.0, 0.01, 232)
    even = [k * 231 / 29 for k in range(30)]
    assert choose_levels(sigmas, 30) == pytest.approx(even, abs=0.5001)
    grid = spaced_sigmas(sigmas, 18, spacing="karras")
    assert grid[0] == 50.0 and grid[-1] == sigmas[-1] and len(grid) == 18
    # Worked by hand: (50^(1/7) + (0.01^(1/7) - 50^(1/7)) / 17)^7.
    assert grid[1] == pytest.approx(37.190, abs=1e-3)
    assert sigmas[choose_levels(sigmas, 18, spacing="karras")].tolist() == pytest.approx(grid, rel=0.02)
    with pytest.raises(ValueError, match=r"steps.*\b1\b"):
        spaced_sigmas(sigmas, 1, spacing="karras")
    with pytest.raises(ValueError, match="num_levels = 1"):
        choose_levels(sigmas, 1)
