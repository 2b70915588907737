"""Bias of the Fréchet distance: the oracles of chapter 2's section 8.3."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad

from ncsn.evaluation.frechet import FrechetStatistics, frechet_distance


def exact(dimension: int) -> FrechetStatistics:
    """The moments of N(0, I), exactly."""
    return FrechetStatistics(10**6, np.zeros(dimension), (10**6 - 1) * np.eye(dimension))


def mean_distance(dimension: int, count: int, *, variance: float = 1.0, two_sided: bool = False, repeats: int) -> float:
    generator = np.random.default_rng(0)

    def draw() -> FrechetStatistics:
        return FrechetStatistics.of(math.sqrt(variance) * generator.standard_normal((count, dimension)))

    return float(np.mean([frechet_distance(draw(), draw() if two_sided else exact(dimension)) for _ in range(repeats)]))


@pytest.mark.parametrize(("count", "one", "two"), [(500, 2.27, 4.45), (1000, 1.109, 2.211), (5000, 0.2220, 0.4437)])
def test_few_samples_have_a_larger_distance(count: int, one: float, two: float) -> None:
    first_order = 64 / count + 64 * 65 / (4 * count)
    assert first_order == pytest.approx(one, rel=0.05)
    assert mean_distance(64, count, repeats=8) == pytest.approx(one, rel=0.05)
    assert mean_distance(64, count, two_sided=True, repeats=4) == pytest.approx(two, rel=0.05)


def mean_root(ratio: float) -> float:
    """Integral of the root of lambda under the Marchenko-Pastur law of d / N = ratio."""
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # With more dimensions than samples the rest of the mass is at zero, whose root is zero.
    density = quad(lambda x: math.sqrt((high - x) * (x - low)) / (2 * math.pi * ratio * math.sqrt(x)), low, high)
    return float(density[0])


def expected_distance(dimension: int, count: int, variance: float) -> float:
    root = mean_root(dimension / count)
    return dimension * (variance + 1 - 2 * math.sqrt(variance) * root) + variance * dimension / count


@pytest.mark.parametrize(
    ("count", "best", "perfect"),
    [(1000, 0.426, 1423), (2048, 0.721, 620), (5000, 0.894, 222.6), (10_000, 0.948, 107.9), (50_000, 0.990, 21.1)],
)
def test_few_samples_favor_little_diversity(count: int, best: float, perfect: float) -> None:
    assert mean_root(2048 / count) ** 2 == pytest.approx(best, abs=6e-4)
    assert expected_distance(2048, count, 1.0) == pytest.approx(perfect, rel=2e-3)


@pytest.mark.parametrize(
    ("variance", "simulated", "formula"), [(1.0, 5.775, 5.669), (0.8, 5.861, 5.753), (0.918, 5.624, 5.531)]
)
def test_the_least_distance_is_not_that_of_the_perfect_model(variance: float, simulated: float, formula: float) -> None:
    assert expected_distance(64, 200, variance) == pytest.approx(formula, abs=2e-3)
    assert mean_distance(64, 200, variance=variance, repeats=60) == pytest.approx(simulated, rel=0.02)


@pytest.mark.parametrize(
    ("count", "variance", "simulated"), [(200, 0.6, 7.68), (31, 1.0, 48.1), (31, 0.6, 40.2), (31, 0.4235, 38.6)]
)
def test_with_fewer_samples_than_features_a_model_of_little_diversity_is_far_ahead(
    count: int, variance: float, simulated: float
) -> None:
    assert mean_distance(64, count, variance=variance, repeats=60) == pytest.approx(simulated, rel=0.02)
