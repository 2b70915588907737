"""Denoising score matching: spec oracles 2 (zero network), 3 (Gaussian data) and 21 (sliced); the held-out loss."""

import math

import pytest
import torch

from ncsn.core.keyed_random import Stream
from ncsn.core.losses import Batch, DenoisingScoreMatching, PowerWeight, losses_at
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.sliced import SlicedScoreMatching

SIGMAS = geometric_sigmas(1.0, 0.01, 10)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dsm_loss(network, x, *, level, sigmas, z, anneal_power=2.0):
    return DenoisingScoreMatching(PowerWeight(anneal_power))(network, Batch(x, sigmas[level], z, level))


def ssm_loss(network, x, *, level, sigmas, z, v, **settings):
    return SlicedScoreMatching(**settings)(network, Batch(x, sigmas[level], z, level, v))


def zero(x, level):
    return torch.zeros_like(x)


@pytest.mark.oracle(2)
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

    def network(noisy, level):
        return torch.sin(5 * noisy) * (1 + level.view(-1, 1, 1, 1))

    for power in (0.0, 1.0, 2.0):
        noisy = x + sigma.view(-1, 1, 1, 1) * z
        target = -(noisy - x) / sigma.view(-1, 1, 1, 1) ** 2
        per_image = 0.5 * (network(noisy, level) - target).square().flatten(1).sum(1)
        result = dsm_loss(network, x, level=level, sigmas=SIGMAS, z=z, anneal_power=power)
        assert result.loss.item() == pytest.approx((sigma**power * per_image).mean().item(), rel=1e-9)
        torch.testing.assert_close(result.per_image, 2 * sigma**2 * per_image / 18, rtol=1e-9, atol=0)
    assert not result.per_image.requires_grad


@pytest.mark.oracle(3)
@pytest.mark.parametrize("sigma", [0.01, 0.4, 1.0])
def test_optimal_score_of_gaussian_data_reaches_the_lower_bound(sigma):
    s2, batch, size = 0.3, 100, 1024
    x, z = math.sqrt(s2) * draws(batch, 1, 32, 32, seed=1), draws(batch, 1, 32, 32, seed=2)
    sigmas, level = torch.tensor([sigma]), torch.zeros(batch, dtype=torch.int64)

    def linear(gain):
        return lambda noisy, level: -gain * noisy / (s2 + sigma**2)

    def loss(gain):
        # Averaged over z and -z: at sigma = 0.01 the gain matters by 3e-6 of the loss, less than the draws' own noise.
        return sum(dsm_loss(linear(gain), x, level=level, sigmas=sigmas, z=s * z).loss.item() for s in (1, -1)) / 2

    assert loss(1.0) == pytest.approx(size / 2 * s2 / (s2 + sigma**2), rel=0.01)
    assert loss(1.0) < min(loss(0.9), loss(1.1))


@pytest.mark.oracle(21)
def test_sliced_score_matching_of_gaussian_data():
    d, s2, sigma, count = 4, 0.7, 0.5, 400_000
    x, z, v = math.sqrt(s2) * draws(count, d, seed=1), draws(count, d, seed=2), draws(count, d, seed=3)
    level, total = torch.zeros(count, dtype=torch.int64), s2 + sigma**2
    settings = {"level": level, "sigmas": torch.tensor([sigma]), "z": z, "v": v, "anneal_power": 0.0}
    for v_net in (1.3, total):
        loss = ssm_loss(lambda noisy, level, v_net=v_net: -noisy / v_net, x, **settings).loss.item()
        assert loss == pytest.approx(d * total / (2 * v_net**2) - d / v_net, abs=0.03)


def test_sliced_and_denoising_score_matching_report_the_same_figure():
    x, level = 0.5 * draws(100_000, 4, seed=1), torch.zeros(100_000, dtype=torch.int64)
    arguments = {"level": level, "sigmas": torch.tensor([0.4]), "z": draws(100_000, 4, seed=2)}

    def network(noisy, level):
        return torch.tanh(-3 * noisy)

    sliced = ssm_loss(network, x, v=draws(100_000, 4, seed=3), **arguments).per_image.mean().item()
    assert sliced == pytest.approx(dsm_loss(network, x, **arguments).per_image.mean().item(), abs=0.01)


def test_slope_term_is_the_jacobian_along_the_projection():
    torch.manual_seed(0)
    matrix = torch.randn(3, 3, dtype=torch.float64)
    x, v = draws(1, 3).double(), draws(1, 3, seed=5).double()
    arguments = {"level": torch.tensor([0]), "sigmas": torch.tensor([2.0]), "z": torch.zeros(1, 3).double(), "v": v}
    loss = ssm_loss(lambda noisy, level: noisy @ matrix.T, x, anneal_power=1.0, **arguments).loss.item()
    slope = (v[0] @ matrix @ v[0]).item()
    assert loss == pytest.approx(2 * (0.5 * (x @ matrix.T).square().sum().item() + slope), rel=1e-12)


def test_the_held_out_loss_of_the_best_network_is_known_at_each_sigma():
    """For images of this distribution, each with noise of its own."""
    sigmas, spread = torch.tensor([2, 1, 0.5, 0.25, 0.1, 0.03], dtype=torch.float64), 0.25

    def best(x, level):
        return -x / (spread**2 + sigmas[level] ** 2).view(-1, 1, 1, 1)

    def losses(x):
        found = losses_at(best, x, first=0, sigmas=sigmas, levels=range(6), stream=Stream.HELD_OUT_NOISE)
        return found.double()

    x = spread * draws(4000, 1, 8, 8).double()
    expected = spread**2 / (spread**2 + sigmas**2)
    torch.testing.assert_close(losses(x).mean(dim=1), expected, rtol=0.02, atol=0)
    assert len(losses(x[:1].repeat(7, 1, 1, 1))[0].unique()) == 7
