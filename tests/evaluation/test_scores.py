"""Scores against known values (spec, oracles 18 and 20), by hand, and torch-fidelity.

Scores by class: what is counted, and a probe that learns classes from features.
"""

import math

import numpy as np
import pytest
import torch
from refused import refused
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from ncsn.data.format import Rows
from ncsn.evaluation.class_scores import RequestedClasses, classes_by_probe, fit_probe
from ncsn.evaluation.extractors import Extracted
from ncsn.evaluation.scores import excess_distance, inception_score, kernel_distance, precision_recall


def log_one_hot(classes: np.ndarray, num_classes: int = 10) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.eye(num_classes)[classes])


SURE = np.log(np.full((10, 10), 0.1 / 9) + (0.9 - 0.1 / 9) * np.eye(10))  # 90 %, balanced


@pytest.mark.oracle(18)
@pytest.mark.parametrize(
    ("log_probabilities", "num_splits", "expected", "tolerance"),
    [
        (np.full((100, 10), -math.log(10)), 5, 1, 1e-12),
        (log_one_hot(np.arange(1000) % 10), 5, 10, 1e-12),
        (log_one_hot(np.full(50, 3)), 5, 1, 1e-12),
        (np.tile(SURE, (100, 1)), 10, 5.799546, 1e-6),
        (log_one_hot(np.random.default_rng(0).integers(0, 10, 5000)), 10, 9.906, 0.05),
    ],
    ids=["uniform", "balanced one-hot", "one class", "90 % sure", "random"],
)
def test_known_scores(log_probabilities: np.ndarray, num_splits: int, expected: float, tolerance: float) -> None:
    assert inception_score(log_probabilities, num_splits=num_splits)[0] == pytest.approx(expected, abs=tolerance)
    with refused("sampling.num_images"):
        inception_score(log_probabilities[: num_splits - 1], num_splits=num_splits)


@pytest.mark.oracle(20)
def test_equal_laws_have_mean_zero() -> None:
    rng = np.random.default_rng(0)
    estimates = [kernel_distance(*rng.standard_normal((2, 500, 64)))[0] for _ in range(50)]
    error = np.std(estimates, ddof=1) / np.sqrt(50)
    assert error == pytest.approx(0.0003, abs=0.0002) and abs(np.mean(estimates)) < 4 * error


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """By its definition."""
    within_x, within_y, across = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    means = [(pairs.sum() - np.trace(pairs)) / (len(pairs) * (len(pairs) - 1)) for pairs in (within_x, within_y)]
    return float(sum(means) - 2 * across.mean())


def test_the_distance_without_a_group_is_that_of_the_others() -> None:
    x, y = np.random.default_rng(4).standard_normal((2, 40, 3))
    without = [squared_mmd(np.delete(x, [group, group + 20], axis=0), y) for group in range(20)]
    assert kernel_distance(x, y) == pytest.approx((squared_mmd(x, y), np.sqrt(19 * np.var(without))), abs=1e-12)


@pytest.mark.parametrize(("count", "classes"), [(150, 1), (150, 10), (400, 1)])
def test_the_deviation_is_that_of_other_samples(count: int, classes: int) -> None:
    """In subsets of all 150 images and of a half of the 400; with classes, the distance between these is no spread."""
    rng = np.random.default_rng(5)
    means = 2 * rng.standard_normal((classes, 4)) + 0.5
    reference = 2 * rng.standard_normal((600, 4))

    def measure() -> tuple[float, float]:
        drawn = means[np.arange(count) % classes] + rng.standard_normal((count, 4))
        return kernel_distance(drawn, reference, num_subsets=4, subset_size=200, classes_in_turn=classes)

    found = np.array([measure() for _ in range(60)])
    assert 0.7 < found[:, 1].mean() / found[:, 0].std() < 1.5


def test_subsets_are_a_function_of_the_seed_and_no_larger_than_the_sets() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((300, 4)), rng.standard_normal((500, 4)) + 1
    assert kernel_distance(a, b, subset_size=100) == kernel_distance(a, b, subset_size=100)
    assert kernel_distance(a, b, subset_size=100, seed=1) != kernel_distance(a, b, subset_size=100)
    assert kernel_distance(a, b, subset_size=1000) == kernel_distance(a, b, subset_size=300)
    assert kernel_distance(a, b, subset_size=100)[1] > 0


def test_points_on_a_line_by_hand() -> None:
    real = np.arange(4.0)[:, None]  # radii to the first neighbor: all 1
    generated = np.array([[0.5], [1.0], [10.0], [10.5]])  # radii .5, .5, .5, .5
    result = precision_recall(generated, real, neighborhood=1, density_neighborhood=1)
    assert result["precision"] == 2 / 4  # 0.5 and 1.0
    assert result["recall"] == 2 / 4  # 0 and 1 (at 0.5 from 0.5), not 2 and 3
    assert result["density"] == (2 + 1) / 4  # 0.5 lies strictly inside two balls, 1.0 in its own
    assert result["coverage"] == 2 / 4


def test_score_agrees_with_torch_fidelity() -> None:
    logits = torch.from_numpy(np.random.default_rng(3).standard_normal((605, 100)) * 3).float()
    expected = isc_features_to_metric(logits, splits=10, shuffle=False)
    mean, std = inception_score(logits.double().log_softmax(1).numpy(), num_splits=10)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert std == pytest.approx(expected["inception_score_std"], rel=1e-6)


def test_precision_and_recall_agree_with_torch_fidelity_in_any_blocks() -> None:
    rng = np.random.default_rng(2)
    one, two = rng.standard_normal((300, 8)), rng.standard_normal((300, 8)) + 0.3
    expected = prc_features_to_metric(torch.from_numpy(one), torch.from_numpy(two), verbose=False)
    measured = precision_recall(one, two)
    assert measured["precision"] == pytest.approx(expected["precision"], abs=1e-6)
    assert measured["recall"] == pytest.approx(expected["recall"], abs=1e-6)
    assert 0.05 < measured["precision"] < 0.95
    assert precision_recall(one, two, block_size=7) == measured
    assert precision_recall(one, one) == pytest.approx(dict.fromkeys(measured, 1)), "strictly inside d_5 are 5"


def extracted(labels: np.ndarray, *, seed: int = 0, shift: float = 0.0) -> Extracted:
    """Features in three clouds around unit vectors, and probabilities of the nearest."""
    rng = np.random.default_rng(seed)
    features = (np.eye(3)[labels] + 0.1 * rng.standard_normal((len(labels), 3)) + shift).astype(np.float32)
    log_probabilities = features - np.log(np.exp(features).sum(axis=1, keepdims=True))
    return Extracted(features=features, log_probabilities=log_probabilities.astype(np.float64))


REFERENCE = np.arange(300) % 3
FEATURES = extracted(REFERENCE).features


@pytest.mark.parametrize("own", [True, False])
def test_images_are_counted_by_what_was_asked_and_what_is_seen(*, own: bool) -> None:
    shown = np.array([0, 1, 2, 0, 1, 1, 0])
    labels = np.array([0, 1, 2, 0, 0, 2, -1])
    asked = RequestedClasses(labels, REFERENCE, 3, own)
    scores = asked.scores(extracted(shown, seed=1), reference=FEATURES, seed=0)
    assert scores is not None
    assert scores.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 1, 1]]
    assert scores.count == 6 and scores.agreement == pytest.approx(4 / 6)
    table = scores.table(("cat", "dog", "bird"))
    assert [(line["name"], line["num_images"]) for line in table] == [("cat", 3), ("dog", 1), ("bird", 2)]
    assert [line["agreement"] for line in table] == pytest.approx([2 / 3, 1, 1 / 2])
    assert table[1]["kid"] is None, "one image has no distance"


def test_an_excess_is_the_difference_of_two_kernel_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all vectors, in blocks of any size."""
    rng = np.random.default_rng(0)
    x, y, reference = 0.5 + rng.standard_normal((70, 6)), rng.standard_normal((40, 6)), rng.standard_normal((90, 6))
    found = excess_distance(x, y, reference)
    assert found[0] == pytest.approx(squared_mmd(x, reference) - squared_mmd(y, reference))
    monkeypatch.setattr("ncsn.evaluation.scores.KERNEL_ROWS", 16)
    monkeypatch.setattr("ncsn.evaluation.scores.BLOCK_VALUES", 16 * 25)
    assert excess_distance(x, y, reference) == pytest.approx(found)


@pytest.mark.parametrize(("shift", "sizes"), [(0.15, (300, 60, 120)), (0.0, (200, 50, 100)), (1.0, (60, 60, 2000))])
def test_the_interval_of_an_excess_holds_the_true_one(shift: float, sizes: tuple[int, int, int]) -> None:
    """Over other samples, test images and references; without a difference it is somewhat too wide."""
    rng, held = np.random.default_rng(0), 0
    far, near, whole = rng.standard_normal((3, 2500, 4))
    expected = excess_distance(far + shift, near, whole)[0] if shift else 0.0
    for _ in range(200):
        x, y, reference = (rng.standard_normal((count, 4)) for count in sizes)
        value, std = excess_distance(x + shift, y, reference)
        held += abs(value - expected) <= 1.96 * std
    assert 0.9 <= held / 200 <= (0.99 if shift else 1)


def test_the_kernel_distance_of_a_class_is_to_its_own_training_images() -> None:
    labels = np.arange(300) % 3
    asked = RequestedClasses(labels, REFERENCE, 3, own=True)
    same, moved = (
        asked.scores(extracted(labels, seed=2, shift=shift), reference=FEATURES, seed=0) for shift in (0.0, 0.5)
    )
    assert same is not None and moved is not None
    assert np.abs(same.kids).max() < 0.02 and abs(same.metrics["class_kid"]) < 0.01
    assert moved.kids.min() > 0.1 and moved.metrics["class_kid"] == pytest.approx(moved.kids.mean())
    swapped = RequestedClasses((labels + 1) % 3, REFERENCE, 3, own=True)
    other = swapped.scores(extracted(labels, seed=2), reference=FEATURES, seed=0)
    assert other is not None and other.agreement == 0 and other.kids.min() > 0.3


def test_without_a_class_there_is_no_score() -> None:
    none = RequestedClasses(np.full(4, -1), REFERENCE, 3, own=True)
    assert none.scores(extracted(np.zeros(4, int)), reference=FEATURES, seed=0) is None
    few = RequestedClasses(np.array([0, 1]), np.full(300, -1), 3, own=True)
    scores = few.scores(extracted(np.array([0, 1])), reference=FEATURES, seed=0)
    assert scores is not None and scores.metrics.keys() == {"class_agreement"}


def test_a_probe_of_pixels_sees_real_digits(digits: tuple[Rows, Rows]) -> None:
    train, test = digits
    features, held_out = (each.images.reshape(len(each), -1).astype(np.float32) for each in digits)
    seen = classes_by_probe(fit_probe(features, train.labels, num_classes=10), held_out)
    assert (seen == test.labels).mean() > 0.9
    # Neither the scale of a feature nor an image without a label matters.
    scaled = fit_probe(1000 * features, train.labels, num_classes=10)
    assert (classes_by_probe(scaled, 1000 * held_out) == seen).mean() > 0.99
    more, unlabeled = np.pad(features, ((0, 50), (0, 0))), np.pad(train.labels, (0, 50), constant_values=-1)
    np.testing.assert_array_equal(classes_by_probe(fit_probe(more, unlabeled, num_classes=10), held_out), seen)
