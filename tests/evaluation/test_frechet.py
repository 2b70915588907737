"""Known values of the Fréchet distance (spec, oracle 19), scipy's, its uncertainty, and running scores."""

import os

import numpy as np
import pytest
import scipy.linalg
from refused import refused
from threadpoolctl import threadpool_info

from ncsn.evaluation.frechet import FrechetStatistics, RunningDistance, frechet_distance, merged, score_of
from ncsn.runs.metrics import with_interval


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def reference(rng: np.random.Generator) -> FrechetStatistics:
    return FrechetStatistics.of(rng.standard_normal((5000, 4)))


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> FrechetStatistics:
    return FrechetStatistics(2, mean, covariance)


@pytest.mark.oracle(19)
def test_known_distances() -> None:
    mean, identity = np.zeros(64), np.eye(64)
    # ||0.5||^2 * 64 + Tr(I + 4I - 2 * 2I) = 16 + 64.
    assert frechet_distance(gaussian(mean, identity), gaussian(mean + 0.5, 4 * identity)) == pytest.approx(80, abs=1e-8)
    statistics = FrechetStatistics.of(np.random.default_rng(0).standard_normal((40, 64)))
    assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("rank", [40, 10])
def test_agrees_with_scipys_square_root(rank: int) -> None:
    """Also for rank-deficient covariances, as with fewer images than features."""
    rng = np.random.default_rng(rank)
    factors = rng.standard_normal((30, rank)), rng.standard_normal((30, rank + 5))
    a, b = (factor @ factor.T / rank for factor in factors)
    expected = np.trace(a + b) - 2 * np.trace(scipy.linalg.sqrtm(a @ b)).real
    for one, other in ((a, b), (b, a)):
        found = frechet_distance(gaussian(np.zeros(30), one), gaussian(np.zeros(30), other))
        assert found == pytest.approx(expected, rel=1e-5)


def test_merged_statistics_are_those_of_the_union_and_a_part_taken_away_leaves_the_rest() -> None:
    features = np.random.default_rng(2).standard_normal((101, 8)) * 3 + 1e3
    one, two, last = map(FrechetStatistics.of, (features[:1], features[1:40], features[40:]))
    whole = merged((one, two, last))
    for found, expected in ((whole, features), (whole.without(two), np.delete(features, np.s_[1:40], axis=0))):
        assert found.count == len(expected)
        np.testing.assert_allclose(found.mean, expected.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(expected, rowvar=False), rtol=1e-8, atol=1e-8)


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
    zeros = FrechetStatistics.of(np.zeros((3, 4)))
    with refused("images"):
        frechet_distance(FrechetStatistics.of(np.zeros((1, 4))), zeros)
    with refused("sampling.num_images"):
        score_of(np.zeros((2, 4)), zeros)


def test_a_score_is_due_when_its_images_are_there_and_is_of_these_alone(rng, reference) -> None:
    """At twice as many images as features, then at doubled numbers, and at the end."""
    features = rng.standard_normal((43, 4)) + 0.3
    running, due = RunningDistance(reference, count=43), []
    for first, last in ((30, 43), (3, 9), (0, 3), (9, 10), (12, 30), (10, 12)):
        due.append(running.add(first, features[first:last]))
    assert [[score.num_images for score in found] for found in due] == [[], [], [8], [], [], [16, 32, 43]]
    for score in (score for found in due for score in found):
        first_images = features[: score.num_images]
        fid = frechet_distance(FrechetStatistics.of(first_images), reference)
        expected = score_of(first_images, reference)
        assert (score.fid, score.log_std) == pytest.approx((fid, expected.log_std), rel=1e-9)
    for count in (5, 8):
        assert [score.num_images for score in RunningDistance(reference, count=count).add(0, features[:count])] == [
            count
        ]


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
        ((1.971, 1.951, 1.991), "1.97 (1.95 to 1.99)"),
        ((0.0123, -0.0004, 0.025), "0.012 (-0.00040 to 0.025)"),
        ((0.0, 0.0, 0.0), "0 (0 to 0)"),
    ],
)
def test_an_interval_has_as_many_digits_as_are_known(numbers: tuple[float, ...], text: str) -> None:
    assert with_interval(*numbers) == text


def test_groups_on_several_cores_have_the_same_uncertainty(rng, reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not depend on it, and later work has all cores again."""

    def threads() -> list[int]:
        return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]

    features, before = rng.standard_normal((200, 4)), threads()
    alone = score_of(features, reference).log_std
    monkeypatch.setattr("ncsn.evaluation.frechet.MANY_FEATURES", 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    assert score_of(features, reference).log_std == pytest.approx(alone, rel=1e-9)
    assert threads() == before


@pytest.mark.parametrize("count", [512, 2000])
def test_the_uncertainty_of_classes_in_turn_is_not_the_distance_between_them(rng, count: int) -> None:
    means = 3 * rng.standard_normal((10, 8))

    def draw(count: int) -> np.ndarray:
        return means[np.arange(count) % 10] + rng.standard_normal((count, 8))

    reference = FrechetStatistics.of(draw(100_000))
    running = (RunningDistance(reference, count=count, classes_in_turn=10) for _ in range(60))
    scores = [each.add(0, draw(count))[-1] for each in running]
    claimed, spread = np.mean([score.log_std for score in scores]), np.std(np.log([score.fid for score in scores]))
    assert 0.8 < claimed / spread < 2.5
