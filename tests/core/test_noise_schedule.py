"""The noise levels; spec oracle 7: techniques 1, 2 and 4 of NCSNv2 against its published settings."""

import pytest
import torch

from ncsn.core.noise_schedule import (
    best_epsilon,
    geometric_sigmas,
    largest_distance,
    level_overlap,
    ratio_for_overlap,
    suggest_noise,
    variance_ratio,
)


def test_levels_of_the_paper():
    sigmas = geometric_sigmas(1.0, 0.01, 10)
    expected = [1, 0.599484, 0.359381, 0.215443, 0.129155, 0.077426, 0.046416, 0.027826, 0.016681, 0.01]
    assert sigmas.dtype == torch.float32 and sigmas.tolist() == pytest.approx(expected, rel=2e-5)
    many = geometric_sigmas(348.0, 0.01, 2311)
    assert many[0] == 348.0 and many[-1] == torch.tensor(0.01) and (many.diff() < 0).all()
    assert geometric_sigmas(0.01, 0.01, 1).equal(torch.tensor([0.01]))


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (geometric_sigmas, {"sigma_1": 0.01, "sigma_L": 1.0, "num_levels": 10}, r"sigma_1 = 0\.01 .*sigma_L = 1\.0"),
        (geometric_sigmas, {"sigma_1": float("nan"), "sigma_L": 0.01, "num_levels": 10}, "sigma_1"),
        (geometric_sigmas, {"sigma_1": 1.0, "sigma_L": 0.01, "num_levels": 1}, "num_levels = 1"),
        (variance_ratio, {"epsilon": 2.1e-4, "sigma_L": 0.01, "ratio": 1.1, "steps_per_level": 5}, "epsilon"),
        (suggest_noise, {"largest": 0.0, "dimension": 4}, "images"),
        (ratio_for_overlap, {"dimension": 3072, "overlap": 1.0}, "overlap"),
        (ratio_for_overlap, {"dimension": 1, "overlap": 0.1}, "overlap"),
    ],
)
def test_what_has_no_levels_is_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(**arguments)


# name, D, sigma_1, L, T, gamma, C, published epsilon and its ratio, best epsilon and its ratio, gamma and L at C = 0.5
TABLE = [
    ("v1 CIFAR", 3072, 1, 10, 100, 1.66810, 0.0000, 2e-5, 1.1111, 3.228e-6, 1.0189, 1.03980, 120),
    ("v2 CIFAR", 3072, 50, 232, 5, 1.03756, 0.5670, 6.2e-6, 1.0555, 6.184e-6, 1.0555, 1.03980, 220),
    ("CelebA64", 12288, 90, 500, 5, 1.01841, 0.5669, 3.3e-6, 1.0314, 3.337e-6, 1.0314, 1.01951, 473),
    ("church96", 27648, 140, 788, 4, 1.01220, 0.5662, 4.9e-6, 1.0247, 2.312e-6, 1.0224, 1.01292, 745),
    ("128px", 49152, 190, 1086, 3, 1.00912, 0.5665, 1.8e-6, 1.0174, 1.767e-6, 1.0174, 1.00966, 1026),
    ("FFHQ256", 196608, 348, 2311, 3, 1.00454, 0.5669, 0.9e-6, 1.0089, 8.93e-7, 1.0089, 1.00481, 2182),
]


@pytest.mark.oracle(7)
@pytest.mark.parametrize("row", TABLE, ids=[row[0] for row in TABLE])
def test_techniques_2_and_4_reproduce_the_published_settings(row):
    _, dimension, sigma_1, levels, steps, gamma, overlap = row[:7]
    published, at_published, best, at_best, half, half_L = row[7:]
    ratio = (sigma_1 / 0.01) ** (1 / (levels - 1))
    assert ratio == pytest.approx(gamma, abs=1e-5)
    assert level_overlap(ratio, dimension=dimension) == pytest.approx(overlap, abs=1e-4)
    settings = {"sigma_L": 0.01, "ratio": ratio, "steps_per_level": steps}
    assert variance_ratio(published, **settings) == pytest.approx(at_published, abs=1e-4)
    assert best_epsilon(**settings) == pytest.approx(best, rel=0.01)
    assert variance_ratio(best, **settings) == pytest.approx(at_best, abs=1e-4)
    assert ratio_for_overlap(dimension) == pytest.approx(half, abs=1e-5)
    assert suggest_noise(sigma_1, dimension=dimension) == (sigma_1, half_L)
    assert level_overlap((sigma_1 / 0.01) ** (1 / (half_L - 1)), dimension=dimension) >= 0.5


def test_variance_ratio_is_what_the_chain_does():
    # One level of a point mass in exact arithmetic: variance v <- (1 - r)^2 v + 2 r, in units of sigma^2.
    r, v = 0.06, 1.2**2
    for _ in range(7):
        v = (1 - r) ** 2 * v + 2 * r
    assert variance_ratio(0.06 * 0.02**2, sigma_L=0.02, ratio=1.2, steps_per_level=7) == pytest.approx(v, rel=1e-12)


def images(count, seed=0):
    return torch.rand(count, 2, 3, 4, generator=torch.Generator().manual_seed(seed))


def all_distances(x, *, flips=False):
    flat = x.flatten(1).double()
    pairs, cross = torch.pdist(flat), torch.cdist(flat, x.flip(-1).flatten(1).double())
    return torch.cat([pairs, cross[torch.ones_like(cross).tril().bool()]]) if flips else pairs


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["all as far from the mean", "some far from it"])
def test_the_largest_distance_is_that_of_all_pairs(monkeypatch, flips, spread):
    monkeypatch.setattr("ncsn.core.noise_schedule._SMALL_BLOCK", 7)
    for seed in range(20):
        scale = torch.rand(60, 1, 1, 1, generator=torch.Generator().manual_seed(seed)).pow(spread)
        found = largest_distance(scale * images(60, seed), flips=flips)
        expected = all_distances(scale * images(60, seed), flips=flips).max().item()
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_largest_distance_is_exact_far_from_zero_and_in_small_blocks(monkeypatch):
    monkeypatch.setattr("ncsn.core.noise_schedule._BLOCK_VALUES", 5 * 24)
    x = torch.full((60, 2, 3, 4), 250 / 255)
    x[7, 0, 0, 0] += 1 / 255
    found = largest_distance(x)
    assert found == pytest.approx(1 / 255, rel=1e-4)


def test_the_largest_distance_compares_few_pairs_and_can_be_cut_short(monkeypatch):
    monkeypatch.setattr("ncsn.core.noise_schedule._SMALL_BLOCK", 10)
    spread = images(1000) * torch.linspace(0, 1, 1000)[:, None, None, None]
    x = (255 * spread).round().to(torch.uint8).permute(0, 2, 3, 1)
    found = largest_distance(x, most_work=0.1 * 1000 * 1001 / 2 * x[0].numel())
    assert found == pytest.approx(all_distances(x / 255).max().item(), rel=1e-5)
    assert 0 < largest_distance(x, most_work=0) < found
