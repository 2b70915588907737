"""Stochastic samplers: spec oracle 12, the recursions of their variances, and what all samplers share."""

from __future__ import annotations

import math

import pytest
import torch

from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.samplers.langevin import annealed_langevin
from ncsn.core.samplers.multistep import DpmSolver, UniPC
from ncsn.core.samplers.ode import KarrasHeun, ProbabilityFlow
from ncsn.core.samplers.stochastic import AnnealedLangevin, ConsistentAnnealed, Langevin, PredictorCorrector

SIGMAS = geometric_sigmas(1.0, 0.01, 10).double()
V2 = geometric_sigmas(50.0, 0.01, 232).double()

EVERY_SAMPLER = [
    Langevin(level=9, step_size=5e-5, num_steps=4, denoise=True),
    AnnealedLangevin(epsilon=2e-5, steps_per_level=2),
    AnnealedLangevin(epsilon=2e-5, steps_per_level=2, denoise=False),
    AnnealedLangevin(epsilon=2e-5, steps_per_level=2, consistent=True),
    ConsistentAnnealed(epsilon=5e-5),
    ConsistentAnnealed(epsilon=5e-5, refine=3, denoise=False),
    PredictorCorrector(),
    PredictorCorrector(predictor="ancestral", corrector_steps=0, num_levels=5),
    PredictorCorrector(corrector_steps=2, denoise=False),
    ProbabilityFlow(),
    ProbabilityFlow(method="euler", num_levels=4, denoise=False),
    ProbabilityFlow(num_levels=6, spacing="karras"),
    KarrasHeun(num_steps=5),
    KarrasHeun(num_steps=5, churn=3.0, denoise=False),
    DpmSolver(num_steps=5),
    DpmSolver(num_levels=6, spacing="geometric", eta=1.0, denoise=False),
    UniPC(num_steps=5),
    UniPC(num_levels=6, spacing="geometric", order=2, denoise=False),
]


@pytest.mark.parametrize("sampler", EVERY_SAMPLER, ids=repr)
def test_every_sampler_keeps_the_convention(sampler, analytic):
    def run(first, count):
        noise = KeyedNoise(3, first=first, count=count, shape=(2, 3, 4))
        network = analytic.GaussianScore(SIGMAS.float(), s2=0.1, mean=0.5)
        start, seen = noise.uniform(0), []
        before = start.clone()
        x = sampler(network, x=start, sigmas=SIGMAS.float(), noise=noise, on_level=lambda k, state: seen.append(k))
        assert torch.equal(start, before), "the start is not changed"
        assert network.calls == sampler.num_evaluations(10), "NFE"
        assert seen == list(range(len(seen))) and seen
        assert x.shape == start.shape and x.dtype == torch.float32 and not x.requires_grad
        return x

    whole = run(0, 7)
    assert torch.isfinite(whole).all()
    assert torch.equal(whole, torch.cat([run(0, 2), run(2, 4), run(6, 1)])), "an image is the same in every batch"


def test_annealed_langevin_is_the_function(analytic):
    noise = KeyedNoise(0, first=0, count=2, shape=(1, 2, 2))
    network = analytic.GaussianScore(SIGMAS.float(), s2=0.1)
    arguments = {"x": noise.uniform(0), "sigmas": SIGMAS.float(), "noise": noise}
    expected = annealed_langevin(network, epsilon=1e-5, steps_per_level=3, denoise=False, **arguments)
    assert torch.equal(AnnealedLangevin(1e-5, 3, denoise=False)(network, **arguments), expected)


def weights(x):
    return x.square().sum().item()


@pytest.mark.parametrize(
    ("sigmas", "epsilon", "refine"), [(SIGMAS, 5e-5, 1), (V2, 5.6e-6, 1), (V2, 1.1e-6, 5), (SIGMAS, 1.5e-4, 1)]
)
def test_consistent_annealing_carries_exactly_the_next_sigma(sigmas, epsilon, refine, analytic):
    network = analytic.GaussianScore(sigmas, s2=0.0)
    levels = len(sigmas) if refine == 1 else (len(sigmas) - 1) * refine + 1
    noise, seen = analytic.UnitNoise(levels + 1), []
    sampler = ConsistentAnnealed(epsilon=epsilon, refine=refine, denoise=False)
    start = noise.start(float(sigmas[0]))
    sampler(network, x=start, sigmas=sigmas, noise=noise, on_level=lambda _, x: seen.append(weights(x)))
    grid = sigmas if refine == 1 else torch.logspace(math.log10(sigmas[0]), math.log10(sigmas[-1]), levels).double()
    # Schedules are float32, so their ratios vary in the seventh digit; the exact ones are tested below.
    tolerance = 1e-5
    assert seen[:-1] == pytest.approx(grid[1:].square().tolist(), rel=tolerance)
    eta = epsilon / float(sigmas[-1]) ** 2
    assert seen[-1] == pytest.approx(((1 - eta) * float(sigmas[-1])) ** 2, rel=tolerance)


@pytest.mark.oracle(12)
def test_consistent_annealing_is_exact_on_an_exact_schedule(analytic):
    sigmas = torch.tensor([2.0**-k for k in range(8)], dtype=torch.float64)
    noise, seen = analytic.UnitNoise(9), []
    sampler = ConsistentAnnealed(epsilon=0.7 * 2.0**-14)
    x = sampler(
        analytic.GaussianScore(sigmas, s2=0.0),
        x=noise.start(1.0),
        sigmas=sigmas,
        noise=noise,
        on_level=lambda _, state: seen.append(weights(state)),
    )
    assert seen[:-1] == pytest.approx(sigmas[1:].square().tolist(), rel=1e-12)
    assert weights(x) < 1e-24, "denoising removes the rest"


@pytest.mark.oracle(12)
@pytest.mark.parametrize("epsilon", [4.0e-5, 1.61e-4])
def test_consistent_annealing_refuses_steps_that_cannot_be_consistent(epsilon, analytic):
    noise = analytic.UnitNoise(11)
    arguments = {"x": noise.start(1.0), "sigmas": SIGMAS, "noise": noise}
    with pytest.raises(ValueError, match=r"epsilon .*4\.005e-05 .*0\.0001599"):
        ConsistentAnnealed(epsilon=epsilon)(analytic.GaussianScore(SIGMAS, s2=0.0), **arguments)


def test_consistent_annealing_needs_a_geometric_schedule(analytic):
    sigmas = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)
    noise = analytic.UnitNoise(4)
    with pytest.raises(ValueError, match="geometric"):
        ConsistentAnnealed(epsilon=1e-2)(
            analytic.GaussianScore(sigmas, s2=0.0), x=noise.start(1.0), sigmas=sigmas, noise=noise
        )


def predict(predictor, sigmas, *, s2, analytic, start, denoise=True):
    noise, seen = analytic.UnitNoise(len(sigmas) + 1), []
    x = PredictorCorrector(predictor=predictor, corrector_steps=0, denoise=denoise)(
        analytic.GaussianScore(sigmas, s2=s2),
        x=noise.start(start),
        sigmas=sigmas,
        noise=noise,
        on_level=lambda _, state: seen.append(weights(state)),
    )
    return weights(x), seen


@pytest.mark.oracle(12)
def test_ancestral_steps_on_a_point_mass_carry_exactly_each_sigma(analytic):
    final, seen = predict("ancestral", SIGMAS, s2=0.0, analytic=analytic, start=float(SIGMAS[0]))
    assert seen == pytest.approx(SIGMAS.square().tolist(), rel=1e-12)
    assert final < 1e-30


@pytest.mark.parametrize("lam", [0.01, 0.1, 1.0, 10.0, 60.0])
def test_ancestral_variance_of_gaussian_data_is_that_of_the_table(lam, analytic):
    ratios = {0.01: 0.622, 0.1: 0.629, 1.0: 0.733, 10.0: 0.943, 60.0: 0.990}
    final, _ = predict("ancestral", SIGMAS, s2=lam, analytic=analytic, start=math.sqrt(lam + 1))
    assert final / lam == pytest.approx(ratios[lam], abs=2e-3)


def test_reverse_diffusion_variance_follows_its_recursion(analytic):
    final, seen = predict("reverse_diffusion", SIGMAS, s2=0.25, analytic=analytic, start=math.sqrt(1.25), denoise=False)
    variance, expected = 1.25, [1.25]
    for a, b in zip(SIGMAS[:-1].tolist(), SIGMAS[1:].tolist(), strict=True):
        dv = a**2 - b**2
        variance = (1 - dv / (0.25 + a**2)) ** 2 * variance + dv
        expected.append(variance)
    assert seen == pytest.approx(expected, rel=1e-9) and final == pytest.approx(expected[-1], rel=1e-9)


def test_corrector_step_has_the_ratio_of_each_images_own_norms(analytic):
    sigmas = torch.tensor([1.0, 0.5], dtype=torch.float64)
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * torch.tensor([0.1, 1.0, 10.0]).double().view(3, 1, 1, 1)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = []
    PredictorCorrector(corrector_steps=1, snr=0.16, denoise=False)(
        analytic.GaussianScore(sigmas, s2=0.0),
        x=x,
        sigmas=sigmas,
        noise=lambda _: z,
        on_level=lambda k, state: seen.append(state.clone()),
    )
    for image in range(3):
        score = -x[image]
        step = 2 * (0.16 * z[image].norm() / score.norm()) ** 2
        torch.testing.assert_close(seen[0][image], x[image] + step * score + (2 * step).sqrt() * z[image])


def test_langevin_at_one_level_reaches_its_variance(analytic):
    noise = KeyedNoise(0, first=0, count=50, shape=(1, 20, 20))
    network = analytic.GaussianScore(SIGMAS.float(), s2=0.04)
    arguments = {"x": 0.2 * noise(1000), "sigmas": SIGMAS.float(), "noise": noise}
    x = Langevin(level=-1, step_size=8e-3, num_steps=40, denoise=False)(network, **arguments)
    target = 0.04 + 0.01**2
    assert x.var().item() == pytest.approx(target * 2 / (2 - 8e-3 / target), rel=0.03)
    with pytest.raises(ValueError, match=r"\b9\b.*\b10\b"):
        Langevin(level=10, step_size=1e-5, num_steps=1, denoise=False)(network, **arguments)


@pytest.mark.parametrize(
    ("lam", "full", "half"),
    [(0.01, 1.028, 1.058), (0.1, 1.031, 1.061), (1.0, 1.031, 1.061), (10.0, 1.028, 0.992), (60.0, 0.651, 0.408)],
)
def test_annealed_langevin_variance_of_gaussian_data_is_that_of_the_table(lam, full, half, analytic):
    # The paper's schedule cannot fill directions of large variance: the table's reason for the cheaper samplers.
    for epsilon, expected in ((2e-5, full), (1e-5, half)):
        noise = analytic.UnitNoise(1001)
        x = AnnealedLangevin(epsilon=epsilon, steps_per_level=100, denoise=False)(
            analytic.GaussianScore(SIGMAS, s2=lam), x=noise.start(math.sqrt(1 / 12)), sigmas=SIGMAS, noise=noise
        )
        assert weights(x) / (lam + 1e-4) == pytest.approx(expected, abs=1e-3)
