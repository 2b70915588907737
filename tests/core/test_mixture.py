"""The core on a two-dimensional mixture with a known score: spec oracles 1, 4, 5, 9 and 11."""

from __future__ import annotations

import math

import pytest
import torch
from mixture import (
    TWO_MODES,
    GaussianMixture,
    annealed_toy_langevin,
    figure_3_start,
    fit_conditional,
    mode_report,
    plain_langevin,
)

from ncsn.core.losses import Batch, DenoisingScoreMatching
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.samplers.chain import sample
from ncsn.core.samplers.langevin import annealed_langevin, denoise_step
from ncsn.core.samplers.settings import DpmSolver

TEN_TO_TENTH = geometric_sigmas(10.0, 0.1, 10)


def noisy_score(x, sigma):
    """The exact score of the mixture with added noise of standard deviation sigma."""
    return TWO_MODES.score(x, std=(1 + sigma**2) ** 0.5)


@pytest.mark.oracle(1)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_score_is_the_gradient_of_the_log_density(dtype, tolerance):
    mixture = GaussianMixture(
        torch.tensor([[0.0, 1.0], [2.0, -1.0], [-3.0, 0.5]]), torch.tensor([0.5, 0.3, 0.2]), std=0.7
    )
    x = (3 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    for sigma in (0.0, 0.5, 10.0):
        std = math.hypot(0.7, sigma)
        (gradient,) = torch.autograd.grad(mixture.log_density(x, std=std).sum(), x)
        torch.testing.assert_close(mixture.score(x, std=std), gradient, rtol=tolerance, atol=tolerance)


def test_log_density_is_normalized():
    axis = torch.linspace(-12, 12, 481, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    mass = TWO_MODES.log_density(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.oracle(9)
@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
def test_tweedie_is_the_exact_posterior_mean(sigma):
    x = 8 * torch.randn(300, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoised = denoise_step(lambda x, _: noisy_score(x, sigma), x, level=0, sigma=sigma)
    distance = (x[:, None] - TWO_MODES.means).square().sum(dim=2)
    posterior = torch.softmax(TWO_MODES.weights.log() - distance / (2 * (1 + sigma**2)), dim=1)
    expected = (posterior @ TWO_MODES.means * sigma**2 + x) / (1 + sigma**2)
    torch.testing.assert_close(denoised, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.oracle(9)
def test_tweedie_of_gaussian_data():
    x = torch.randn(5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    denoised = denoise_step(lambda x, _: -x / (0.3 + 0.49), x, level=0, sigma=0.7)
    torch.testing.assert_close(denoised, x * 0.3 / (0.3 + 0.49), rtol=1e-10, atol=0)


def test_samples_have_the_mixtures_weights_and_spread():
    report = mode_report(TWO_MODES.sample(20_000, generator=torch.Generator().manual_seed(0)))
    assert report.weight == pytest.approx(0.8, abs=0.012) and report.variance == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(report.mean, torch.full((2,), 5.0), rtol=0, atol=0.05)


@pytest.mark.oracle(5)
def test_plain_langevin_leaves_half_of_the_points_at_each_mode():
    generator = torch.Generator().manual_seed(0)
    report = mode_report(plain_langevin(figure_3_start(generator=generator), generator=generator))
    assert 0.44 <= report.weight <= 0.56


@pytest.mark.oracle(5)
def test_annealed_langevin_finds_the_weights():
    generator = torch.Generator().manual_seed(0)
    report = mode_report(annealed_toy_langevin(figure_3_start(generator=generator), generator=generator))
    assert 0.74 <= report.weight <= 0.84
    torch.testing.assert_close(report.mean, torch.full((2,), 5.0), rtol=0, atol=0.15)
    assert 1 <= report.variance <= 1.25


def test_the_levels_in_the_papers_text_diverge():
    generator = torch.Generator().manual_seed(0)
    x = annealed_toy_langevin(figure_3_start(100, generator=generator), generator=generator, sigma_1=10.0, sigma_L=0.1)
    assert not torch.isfinite(x).all() or x.abs().max() > 1e6


def added_noise_weight(steps, count):
    generator = torch.Generator().manual_seed(0)
    x = annealed_langevin(
        lambda x, level: noisy_score(x, TEN_TO_TENTH[level]),
        x=figure_3_start(count, generator=generator),
        sigmas=TEN_TO_TENTH,
        epsilon=0.5e-3,
        steps_per_level=steps,
        noise=lambda _: torch.randn(count, 2, generator=generator),
        denoise=False,
    )
    return mode_report(x).weight


@pytest.mark.oracle(5)
def test_more_steps_per_level_bring_the_weight_nearer():
    weights = [added_noise_weight(steps, 6000) for steps in (5, 20, 100)]
    # Measured at 30,000 points (the spec's .616, .702 and .775 are of fewer); the standard error at 6,000 is 0.006.
    for weight, expected in zip(weights, (0.612, 0.693, 0.773), strict=True):
        assert weight == pytest.approx(expected, abs=0.02)
    assert weights == sorted(weights)


def ode_weight(start_std_from_data):
    generator, count = torch.Generator().manual_seed(0), 10_000
    sigmas = geometric_sigmas(10.0, 0.1, 20)
    z = torch.randn(count, 2, generator=generator)
    if start_std_from_data:
        mean = TWO_MODES.weights @ TWO_MODES.means
        spread = TWO_MODES.means - mean
        covariance = (1 + 10.0**2) * torch.eye(2).double() + (TWO_MODES.weights[:, None] * spread).T @ spread
        x = (mean + z.double() @ torch.linalg.cholesky(covariance).T).float()
    else:
        x = 10 * z
    sampler = DpmSolver(num_levels=len(sigmas), spacing="geometric", denoise=False)
    score = lambda x, level: noisy_score(x, sigmas[level])  # noqa: E731
    return mode_report(sample(sampler, score, x=x, sigmas=sigmas, noise=None))


@pytest.mark.oracle(11)
def test_probability_flow_needs_the_moment_matched_start():
    matched = ode_weight(True)
    assert 0.78 <= matched.weight <= 0.82
    assert matched.mean.mean().item() == pytest.approx(4.985, abs=0.05)
    assert matched.variance == pytest.approx(1.08, abs=0.06)
    assert ode_weight(False).weight < 0.75


def relative_errors(network, *, count=8000):
    generator, errors = torch.Generator().manual_seed(5), []
    for level, sigma in enumerate(TEN_TO_TENTH.tolist()):
        x = TWO_MODES.sample(count, generator=generator, std=math.hypot(1, sigma))
        exact = noisy_score(x, sigma)
        with torch.no_grad():
            learned = network(x, torch.full((count,), level))
        errors.append(((learned - exact).square().sum() / exact.square().sum()).item())
    return errors


def losses(network, level, *, count=200_000):
    generator = torch.Generator().manual_seed(6)
    x, z = TWO_MODES.sample(count, generator=generator), torch.randn(count, 2, generator=generator)
    with torch.no_grad():
        levels = torch.full((count,), level)
        return DenoisingScoreMatching()(network, Batch(x, TEN_TO_TENTH[levels], z, levels)).loss.item()


@pytest.mark.oracle(4)
@pytest.mark.slow
def test_denoising_score_matching_learns_the_exact_score():
    network, ema = fit_conditional(TEN_TO_TENTH)
    raw = relative_errors(network)
    ema.copy_to(network)
    averaged = relative_errors(network)
    assert max(averaged) < 0.05 and max(averaged[:8]) < 0.01
    assert averaged[9] < raw[9]
    for level, minimum in ((0, 0.1216), (5, 0.6268), (9, 0.9888)):
        exact = losses(lambda x, level: noisy_score(x, TEN_TO_TENTH[level]), level)
        assert exact == pytest.approx(minimum, rel=0.01)
        assert losses(network, level) == pytest.approx(exact, rel=0.006)


def test_denoising_score_matching_approaches_the_exact_score_quickly():
    _, ema = fit_conditional(TEN_TO_TENTH, num_steps=400, batch_size=256, ema_decay=0.98)
    network, _ = fit_conditional(TEN_TO_TENTH, num_steps=0)
    fresh = relative_errors(network)
    ema.copy_to(network)
    assert max(relative_errors(network)[:8]) < 0.1 < min(fresh)


def test_plain_langevin_follows_the_score_it_is_given():
    generator = torch.Generator().manual_seed(0)
    x = plain_langevin(torch.full((2000, 2), 3.0), generator=generator, score=lambda x: -x)
    assert x.mean().item() == pytest.approx(0, abs=0.05) and x.var().item() == pytest.approx(1.026, abs=0.08)
