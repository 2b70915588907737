"""The lognormal sigma of training and the weight of its loss: chapter 2's oracles of section 1."""

import pytest
import torch
from torch import Tensor

from ncsn.core.losses import Batch, DenoisingScoreMatching, EdmWeight
from ncsn.core.training_noise import STRATA, LevelNoise, LognormalNoise
from ncsn.core.uncertainty import Uncertainty

MEAN, STD, SIGMA_DATA = -1.893147, 1.2, 0.25
NOISE = LognormalNoise(MEAN, STD)
WEIGHT = EdmWeight(SIGMA_DATA)
LOSS = DenoisingScoreMatching(WEIGHT)


def quantiles(count: int) -> Tensor:
    """Middles of `count` equally probable parts, [count] float64."""
    return NOISE.quantile((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("levels", [1, 12, 232])
def test_levels_are_counted_in_at_most_ten_bins(levels: int) -> None:
    noise = LevelNoise(torch.linspace(1, 0.01, levels))
    empty = torch.zeros(levels, 0)
    bins = noise.bin_of(Batch(empty, noise.sigmas, empty, torch.arange(levels)))
    assert bins.unique().tolist() == list(range(min(levels, 10))) and bins.tolist() == sorted(bins)
    for number, sigmas in enumerate(noise.spread(16)):
        assert set(sigmas.tolist()) <= set(noise.sigmas[bins == number].tolist())
    assert len(noise.bins) == min(levels, 10) and (noise.bins.diff() < 0).all()


def test_a_million_draws_have_the_distribution() -> None:
    sigma, level = NOISE.draw(3, first=0, count=1_000_000)
    assert level is None and sigma.isfinite().all() and sigma.min() > 0
    assert ((2 * sigma > 0.05) & (2 * sigma < 2)).double().mean().item() == pytest.approx(0.8754, abs=1.3e-3)
    assert sigma.double().log().mean().item() == pytest.approx(MEAN, abs=5e-3)
    assert sigma.double().log().std().item() == pytest.approx(STD, abs=5e-3)
    empty = torch.zeros(len(sigma), 0)
    shares = torch.bincount(NOISE.bin_of(Batch(empty, sigma, empty)), minlength=10) / len(sigma)
    assert shares.tolist() == pytest.approx([0.1] * 10, abs=1.2e-3)
    medians = [1.084, 0.5223, 0.3383, 0.2391, 0.1751, 0.1295, 0.0948, 0.0670, 0.0434, 0.0209]
    assert NOISE.bins.tolist() == pytest.approx(medians, rel=2e-3)


def test_each_block_has_one_draw_of_each_stratum() -> None:
    sigma = NOISE.draw(0, first=0, count=3 * STRATA)[0].double()
    stratum = (torch.special.ndtr((sigma.log() - MEAN) / STD) * STRATA).long().view(3, STRATA)
    assert torch.equal(stratum.sort(dim=1).values, torch.arange(STRATA).expand(3, STRATA))
    assert not torch.equal(stratum[0], stratum[1])


def test_the_weight_is_that_of_the_denoiser() -> None:
    sigma, y, z = quantiles(50), normal(50, seed=0), normal(50, seed=1)
    denoised = normal(50, seed=2)
    score = (denoised - (y + sigma * z)) / sigma**2
    theirs = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2 * (denoised - y) ** 2
    torch.testing.assert_close(WEIGHT(sigma) * (sigma * score + z) ** 2, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("spread", "best", "fresh"), [(0.1, 0.259562, 0.648580), (1.0, 1.628323, 2.098187)])
def test_losses_of_known_scores(spread: float, best: float, fresh: float) -> None:
    """Gaussian images of this deviation in units of [-1, 1]: the best score, and that of a fresh network."""
    x = spread / 2 * normal(100_000, 4, seed=7)
    sigma = quantiles(len(x))[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    for variance, expected in (((spread / 2) ** 2, best), (SIGMA_DATA**2, fresh)):

        def score(noisy: Tensor, sigma: Tensor, variance: float = variance) -> Tensor:
            return -noisy / (variance + sigma**2)[:, None]

        loss = LOSS(score, Batch(x, sigma, normal(*x.shape, seed=1))).loss.item()
        assert 2 * loss / x.shape[1] == pytest.approx(expected, rel=0.01)


def test_how_far_the_network_has_seen() -> None:
    assert [NOISE.largest_seen(images) for images in (200_000_000, 800_000)] == pytest.approx([30.2, 5.67], rel=5e-3)
    assert NOISE.largest_seen(500) == 0


def test_the_uncertainty_learns_the_loss() -> None:
    """For Gaussian images and their best score: e^u is the loss at each sigma, and the whole loss its mean of 1 + u."""
    uncertainty, spread = Uncertainty(), 0.05
    loss = DenoisingScoreMatching(WEIGHT, uncertainty=uncertainty)
    optimizer = torch.optim.Adam(uncertainty.parameters(), lr=0.05)

    def score(noisy: Tensor, sigma: Tensor) -> Tensor:
        return -noisy / (spread**2 + sigma**2)[:, None]

    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        sigma = NOISE.draw(0, first=1024 * step, count=1024)[0]
        batch = Batch(spread * normal(1024, 16, seed=step).float(), sigma, normal(1024, 16, seed=1000 + step).float())
        optimizer.zero_grad()
        value = loss(score, batch)
        torch.autograd.backward(value.loss)
        optimizer.step()
    sigma = NOISE.bins
    expected = WEIGHT(sigma) * spread**2 / (spread**2 + sigma**2)
    with torch.no_grad():
        torch.testing.assert_close(uncertainty(sigma).exp(), expected, rtol=0.06, atol=0)
        mean = (1 + uncertainty(quantiles(10_000).float())).mean().item()
    assert 2 * value.loss.item() / 16 == pytest.approx(mean, abs=0.05)
