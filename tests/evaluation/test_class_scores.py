"""Scores by class: what is counted, and a probe that learns classes from features."""

from __future__ import annotations

import numpy as np
import pytest

from ncsn.data.format import Rows
from ncsn.evaluation.class_scores import AskedClasses, class_scores, classes_by_probe, fit_probe
from ncsn.evaluation.extractors import Extracted

NAMES = ("cat", "dog", "bird")


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
    asked = AskedClasses(labels, REFERENCE, 3, own)
    scores = class_scores(extracted(shown, seed=1), asked, reference=FEATURES, seed=0)
    assert scores is not None
    assert scores.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 1, 1]]
    assert scores.count == 6 and scores.agreement == pytest.approx(4 / 6)
    table = scores.table(NAMES)
    assert [(line["name"], line["num_images"]) for line in table] == [("cat", 3), ("dog", 1), ("bird", 2)]
    assert [line["agreement"] for line in table] == pytest.approx([2 / 3, 1, 1 / 2])
    assert table[1]["kid"] is None, "one image has no distance"


def test_the_kernel_distance_of_a_class_is_to_its_own_training_images() -> None:
    labels = np.arange(300) % 3
    asked = AskedClasses(labels, REFERENCE, 3, own=True)
    same, moved = (
        class_scores(extracted(labels, seed=2, shift=shift), asked, reference=FEATURES, seed=0) for shift in (0.0, 0.5)
    )
    assert same is not None and moved is not None
    assert np.abs(same.kids).max() < 0.02 and abs(same.metrics["class_kid"]) < 0.01
    assert moved.kids.min() > 0.1 and moved.metrics["class_kid"] == pytest.approx(moved.kids.mean())
    swapped = AskedClasses((labels + 1) % 3, REFERENCE, 3, own=True)
    other = class_scores(extracted(labels, seed=2), swapped, reference=FEATURES, seed=0)
    assert other is not None and other.agreement == 0 and other.kids.min() > 0.3


def test_without_a_class_there_is_no_score() -> None:
    none = AskedClasses(np.full(4, -1), REFERENCE, 3, own=True)
    assert class_scores(extracted(np.zeros(4, int)), none, reference=FEATURES, seed=0) is None
    few = AskedClasses(np.array([0, 1]), np.full(300, -1), 3, own=True)
    scores = class_scores(extracted(np.array([0, 1])), few, reference=FEATURES, seed=0)
    assert scores is not None and scores.metrics.keys() == {"class_agreement"}


def test_a_probe_of_pixels_sees_real_digits(digits: tuple[Rows, Rows]) -> None:
    train, test = digits
    features = train.images.reshape(len(train), -1).astype(np.float32)
    held_out = test.images.reshape(len(test), -1).astype(np.float32)
    probe = fit_probe(features, train.labels, num_classes=10)
    right = classes_by_probe(probe, held_out) == test.labels
    assert right.mean() > 0.9
    # Neither the scale of a feature nor an image without a label matters.
    scaled = fit_probe(1000 * features, train.labels, num_classes=10)
    assert (classes_by_probe(scaled, 1000 * held_out) == classes_by_probe(probe, held_out)).mean() > 0.99
    unlabeled = np.concatenate([train.labels, np.full(50, -1)])
    more = np.concatenate([features, np.zeros((50, features.shape[1]), np.float32)])
    again = fit_probe(more, unlabeled, num_classes=10)
    np.testing.assert_array_equal(classes_by_probe(again, held_out), classes_by_probe(probe, held_out))
