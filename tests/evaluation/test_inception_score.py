"""Known values of the Inception-score formula (spec, oracle 18)."""

import math

import numpy as np
import pytest

from ncsn.evaluation.scores import inception_score


def log_one_hot(classes: np.ndarray, num_classes: int = 10) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.eye(num_classes)[classes])


@pytest.mark.oracle(18)
def test_uniform_predictions_score_one() -> None:
    score = inception_score(np.full((100, 10), -math.log(10)), num_splits=10)
    assert score.mean == pytest.approx(1, abs=1e-12)
    assert score.std == pytest.approx(0, abs=1e-12)


@pytest.mark.oracle(18)
def test_balanced_one_hot_scores_the_number_of_classes() -> None:
    assert inception_score(log_one_hot(np.arange(1000) % 10), num_splits=10).mean == pytest.approx(10, abs=1e-12)


@pytest.mark.oracle(18)
def test_one_class_scores_one() -> None:
    assert inception_score(log_one_hot(np.full(50, 3)), num_splits=5).mean == 1


@pytest.mark.oracle(18)
def test_confidence_of_nine_tenths_balanced() -> None:
    p = np.full((10, 10), 0.1 / 9)
    np.fill_diagonal(p, 0.9)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1 / 9))
    assert inception_score(np.log(np.tile(p, (100, 1)))).mean == pytest.approx(math.exp(math.log(10) - entropy))
    assert inception_score(np.log(p), num_splits=1).mean == pytest.approx(5.799546, abs=1e-6)


@pytest.mark.oracle(18)
def test_random_one_hot_has_the_finite_sample_bias() -> None:
    classes = np.random.default_rng(0).integers(0, 10, 5000)
    assert inception_score(log_one_hot(classes)).mean == pytest.approx(9.906, abs=0.05)


def test_splits_are_contiguous_and_std_is_the_population_one() -> None:
    rows = log_one_hot(np.array([0, 0, 0, 0, 1, 2, 1, 2]), num_classes=4)
    score = inception_score(rows, num_splits=2)
    assert (score.mean, score.std) == (pytest.approx(1.5), pytest.approx(0.5))
    assert inception_score(rows[[0, 4, 1, 5, 2, 6, 3, 7]], num_splits=2).mean > 1.5


def test_every_row_counts_when_splits_do_not_divide() -> None:
    rows = log_one_hot(np.array([0, 0, 1, 2, 2]))
    # Splits [0, 0] and [1, 2, 2]: 1 and exp(H(1/3, 2/3)).
    second = math.exp(-(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3))
    assert inception_score(rows, num_splits=2).mean == pytest.approx((1 + second) / 2)


@pytest.mark.parametrize(
    ("rows", "splits", "message"),
    [
        (np.full((9, 10), -math.log(10)), 10, "sampling.num_images = 9"),
        (np.full((20, 10), np.nan), 10, "20 of 20"),
        (np.zeros((20, 10)), 10, "log_softmax"),
        (np.zeros(20), 10, r"\[20\]"),
        (np.full((20, 10), -math.log(10)), 0, "num_splits = 0"),
    ],
)
def test_bad_input_is_refused(rows: np.ndarray, splits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inception_score(rows, num_splits=splits)
