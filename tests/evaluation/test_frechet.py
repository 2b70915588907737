"""Known values of the Fréchet distance (spec, oracle 19), scipy's, its uncertainty, and running scores."""

from __future__ import annotations

import os

import numpy as np
import pytest
import scipy.linalg
from numpy.typing import NDArray
from refused import refused
from threadpoolctl import threadpool_info

from ncsn.evaluation import with_interval
from ncsn.evaluation.frechet import (
    JACKKNIFE_GROUPS,
    FrechetStatistics,
    RunningDistance,
    frechet_distance,
    frechet_jackknife,
    merged,
    score_of,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def reference(rng: np.random.Generator) -> FrechetStatistics:
    return FrechetStatistics.of(rng.standard_normal((5000, 4)))


def frechet_uncertainty(features: np.ndarray, reference: FrechetStatistics) -> float:
    groups = min(JACKKNIFE_GROUPS, len(features))
    return frechet_jackknife([FrechetStatistics.of(features[first::groups]) for first in range(groups)], reference)


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> FrechetStatistics:
    return FrechetStatistics(2, mean, covariance)


def random_covariance(rng: np.random.Generator, size: int, *, rank: int) -> np.ndarray:
    factor = rng.standard_normal((size, rank))
    return factor @ factor.T / rank


@pytest.mark.oracle(19)
def test_known_distances() -> None:
    mean, identity = np.zeros(64), np.eye(64)
    # ||0.5||^2 * 64 + Tr(I + 4I - 2 * 2I) = 16 + 64.
    assert frechet_distance(gaussian(mean, identity), gaussian(mean + 0.5, 4 * identity)) == pytest.approx(80, abs=1e-8)
    statistics = FrechetStatistics.of(np.random.default_rng(0).standard_normal((40, 64)))
    assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-9)
    u, v, zero = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.0]), np.zeros(3)
    expected = ((np.sqrt(u) - np.sqrt(v)) ** 2).sum()
    found = frechet_distance(gaussian(zero, np.diag(u)), gaussian(zero, np.diag(v)))
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.oracle(19)
def test_symmetric_and_invariant_under_rotation() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((200, 12)), 0.3 + 2 * rng.standard_normal((300, 12))
    rotation, _ = np.linalg.qr(rng.standard_normal((12, 12)))
    distance = frechet_distance(FrechetStatistics.of(a), FrechetStatistics.of(b))
    assert frechet_distance(FrechetStatistics.of(b), FrechetStatistics.of(a)) == pytest.approx(distance, rel=1e-10)
    rotated = frechet_distance(FrechetStatistics.of(a @ rotation), FrechetStatistics.of(b @ rotation))
    assert rotated == pytest.approx(distance, rel=1e-10)


@pytest.mark.parametrize("rank", [40, 10])
def test_agrees_with_scipys_square_root(rank: int) -> None:
    """Also for rank-deficient covariances, as with fewer images than features."""
    rng = np.random.default_rng(rank)
    a, b = random_covariance(rng, 30, rank=rank), random_covariance(rng, 30, rank=rank + 5)
    zero = np.zeros(30)
    expected = np.trace(a + b) - 2 * np.trace(scipy.linalg.sqrtm(a @ b)).real
    assert frechet_distance(gaussian(zero, a), gaussian(zero, b)) == pytest.approx(expected, rel=1e-5)


def test_merged_statistics_are_those_of_the_union_and_a_part_taken_away_leaves_the_rest() -> None:
    features = np.random.default_rng(2).standard_normal((101, 8)) * 3 + 1e3
    one, two, last = map(FrechetStatistics.of, (features[:1], features[1:40], features[40:]))
    whole, rest = merged((one, two, last)), merged((one, two, last)).without(two)
    direct = merged((one, last))
    assert rest.count == direct.count == 62
    np.testing.assert_allclose(rest.mean, direct.mean, rtol=1e-12)
    np.testing.assert_allclose(rest.scatter, direct.scatter, rtol=1e-8, atol=1e-8)
    assert whole.count == 101
    np.testing.assert_allclose(whole.mean, features.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(whole.covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-9)


@pytest.mark.oracle(19)
def test_finite_sample_bias_falls_as_one_over_n() -> None:
    """n against 2n draws of N(0, I), d = 64: to first order (d + d (d + 1) / 4) (1 / n + 1 / 2n)."""
    rng = np.random.default_rng(3)
    for count, expected in ((500, 3.30), (1000, 1.67), (5000, 0.337), (20_000, 0.082)):
        a, b = rng.standard_normal((count, 64)), rng.standard_normal((2 * count, 64))
        distance = frechet_distance(FrechetStatistics.of(a), FrechetStatistics.of(b))
        assert distance == pytest.approx(expected, rel=0.1)


def test_what_has_no_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2"):
        FrechetStatistics.of(np.array([[0.0, np.nan], [1.0, 2.0]]))
    one = FrechetStatistics.of(np.zeros((3, 4)))
    with refused("images"):
        frechet_distance(FrechetStatistics.of(np.zeros((1, 4))), one)
    with refused("sampling.num_images"):
        frechet_uncertainty(np.zeros((2, 4)), one)


def test_a_score_is_due_when_its_images_are_there_and_is_of_these_alone(rng, reference) -> None:
    features = rng.standard_normal((43, 4)) + 0.3
    running, due = RunningDistance(reference, count=43), []
    for first, last in ((30, 43), (3, 9), (0, 3), (9, 10), (12, 30), (10, 12)):
        due.append(running.add(first, features[first:last]))
    assert [[score.num_images for score in found] for found in due] == [[], [], [8], [], [], [16, 32, 43]]
    assert merged(filter(None, running.groups)).count == running.count == 43
    for score in (score for found in due for score in found):
        first_images = features[: score.num_images]
        fid = frechet_distance(FrechetStatistics.of(first_images), reference)
        assert (score.fid, score.log_std) == pytest.approx(
            (fid, frechet_uncertainty(first_images, reference)), rel=1e-9
        )


@pytest.mark.parametrize(("shift", "count"), [(0.5, 400), (0.2, 60)])
def test_intervals_hold_the_expected_distance_of_as_many_images(rng, reference, shift: float, count: int) -> None:
    """Also where half of the distance is its spread, and the luckiest set would claim the least error."""
    scores = [score_of(rng.standard_normal((count, 4)) + shift, reference).values for _ in range(200)]
    expected = np.exp(np.mean(np.log([score["fid"] for score in scores])))
    assert 0.90 <= np.mean([score["fid_low"] <= expected <= score["fid_high"] for score in scores]) <= 0.99
    for score in scores:
        assert score["fid"] ** 2 == pytest.approx(score["fid_low"] * score["fid_high"])


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((7.61, 4.43, 13.07), "7.6 (4.4 to 13)"),
        ((397.2, 299.0, 527.6), "397 (299 to 528)"),
        ((1.971, 1.951, 1.991), "1.97 (1.95 to 1.99)"),
        ((0.0123, -0.0004, 0.025), "0.012 (-0.00040 to 0.025)"),
        ((0.0, 0.0, 0.0), "0 (0 to 0)"),
    ],
)
def test_an_interval_has_as_many_digits_as_are_known(numbers: tuple[float, ...], text: str) -> None:
    assert with_interval(*numbers) == text


@pytest.mark.parametrize(("images", "due"), [(100, [8, 16, 32, 64, 100]), (64, [8, 16, 32, 64]), (8, [8]), (5, [5])])
def test_scores_are_due_at_twice_the_features_and_doubled(rng, reference, images: int, due: list[int]) -> None:
    found = RunningDistance(reference, count=images).add(0, rng.standard_normal((images, 4)))
    assert [score.num_images for score in found] == due


def test_groups_on_several_cores_have_the_same_uncertainty(rng, reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not depend on it, and later work has all cores again."""
    features = rng.standard_normal((200, 4))
    groups = [FrechetStatistics.of(features[first::JACKKNIFE_GROUPS]) for first in range(JACKKNIFE_GROUPS)]
    alone = frechet_jackknife(groups, reference)
    threads = [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]
    monkeypatch.setattr("ncsn.evaluation.frechet.MANY_FEATURES", 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    assert frechet_jackknife(groups, reference) == pytest.approx(alone, rel=1e-9)
    assert [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"] == threads


def test_the_uncertainty_of_classes_in_turn_is_not_the_distance_between_them() -> None:
    generator = np.random.default_rng(0)
    means = 3 * generator.standard_normal((10, 8))

    def draw(count: int) -> NDArray[np.float64]:
        return means[np.arange(count) % 10] + generator.standard_normal((count, 8))

    reference = FrechetStatistics.of(draw(100_000))
    for count in (512, 2000):
        found, claimed = [], []
        for _ in range(60):
            running = RunningDistance(reference, count=count, classes_in_turn=10)
            last = running.add(0, draw(count))[-1]
            assert None not in running.groups and len(running.groups) == JACKKNIFE_GROUPS
            found.append(np.log(last.fid))
            claimed.append(last.log_std)
        assert 0.8 < np.mean(claimed) / np.std(found) < 2.5
