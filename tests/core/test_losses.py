"""Denoising score matching: spec oracles 2 (zero network) and 3 (Gaussian data)."""

from __future__ import annotations

import math

import pytest
import torch

from ncsn.core.losses import dsm_loss, level_sums
from ncsn.core.noise_schedule import geometric_sigmas

SIGMAS = geometric_sigmas(1.0, 0.01, 10)


def draws(*shape: int, seed: int = 0) -> torch.Generator:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def zero(x, level):
    return torch.zeros_like(x)


def test_zero_network_has_half_the_dimension_as_loss_and_reads_one():
    x, z = torch.rand(128, 3, 32, 32), draws(128, 3, 32, 32)
    level = torch.arange(128) % 10
    result = dsm_loss(zero, x, level=level, sigmas=SIGMAS, z=z)
    assert result.loss.item() == pytest.approx(1536, abs=14)
    assert result.per_image.mean().item() == pytest.approx(1, abs=14 / 1536)
    assert result.loss.item() == pytest.approx(0.5 * z.square().sum().item() / 128, rel=1e-5)


def test_loss_is_equation_5_weighted_by_sigma_to_the_anneal_power():
    x, z = torch.rand(4, 2, 3, 3, dtype=torch.float64), draws(4, 2, 3, 3).double()
    level = torch.tensor([0, 3, 9, 9])
    sigma = SIGMAS.double()[level]

    def network(noisy, noise_level):
        return torch.sin(5 * noisy) * (1 + noise_level.view(-1, 1, 1, 1))

    for power in (0.0, 1.0, 2.0):
        noisy = x + sigma.view(-1, 1, 1, 1) * z
        target = -(noisy - x) / sigma.view(-1, 1, 1, 1) ** 2
        per_image = 0.5 * (network(noisy, level) - target).square().flatten(1).sum(1)
        result = dsm_loss(network, x, level=level, sigmas=SIGMAS, z=z, anneal_power=power)
        assert result.loss.item() == pytest.approx((sigma**power * per_image).mean().item(), rel=1e-9)
        torch.testing.assert_close(result.per_image, 2 * sigma**2 * per_image / 18, rtol=1e-9, atol=0)
    assert not result.per_image.requires_grad


@pytest.mark.parametrize("sigma", [0.01, 0.4, 1.0])
def test_optimal_score_of_gaussian_data_reaches_the_lower_bound(sigma):
    s2, batch, size = 0.3, 100, 1024
    x, z = math.sqrt(s2) * draws(batch, 1, 32, 32, seed=1), draws(batch, 1, 32, 32, seed=2)
    sigmas, level = torch.tensor([sigma]), torch.zeros(batch, dtype=torch.int64)

    def linear(gain):
        return lambda noisy, _: -gain * noisy / (s2 + sigma**2)

    losses = {g: dsm_loss(linear(g), x, level=level, sigmas=sigmas, z=z).loss.item() for g in (0.9, 1.0, 1.1)}
    assert losses[1.0] == pytest.approx(size / 2 * s2 / (s2 + sigma**2), rel=0.01)
    assert losses[1.0] < losses[0.9] or sigma < 0.1
    if sigma >= 0.4:
        assert losses[1.0] < min(losses[0.9], losses[1.1])


def test_regression_of_the_noise_on_the_noisy_image_has_the_scores_slope():
    s2, sigma = 0.3, 0.5
    x, z = math.sqrt(s2) * draws(10, 10000, seed=3), draws(10, 10000, seed=4)
    noisy = x + sigma * z
    slope = -(noisy * z).sum() / noisy.square().sum()
    assert slope.item() == pytest.approx(-sigma / (s2 + sigma**2), rel=0.01)


def test_low_precision_network_still_gives_a_float32_loss():
    x, z = torch.rand(2, 1, 4, 4), draws(2, 1, 4, 4)
    result = dsm_loss(lambda noisy, _: -noisy.bfloat16(), x, level=torch.tensor([0, 9]), sigmas=SIGMAS, z=z)
    assert result.loss.dtype == result.per_image.dtype == torch.float32


def test_level_sums_add_up_over_batches_to_the_mean_at_each_level():
    values, level = torch.rand(50), torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(0))
    level[level == 2] = 1
    parts = [level_sums(values[a:b], level=level[a:b], num_levels=4) for a, b in ((0, 20), (20, 50))]
    sums, counts = (torch.stack(part).sum(dim=0) for part in zip(*parts, strict=True))
    assert counts.tolist() == torch.bincount(level, minlength=4).tolist() and counts[2] == 0
    for index in (0, 1, 3):
        assert (sums / counts)[index].item() == pytest.approx(values[level == index].double().mean().item(), rel=1e-12)


def test_nan_stays_at_its_level():
    sums, _ = level_sums(torch.tensor([1.0, math.nan]), level=torch.tensor([0, 1]), num_levels=2)
    assert sums[0] == 1 and math.isnan(sums[1])
