"""The reference is stored once per extractor and dataset."""

from pathlib import Path

import numpy as np
import pytest

from ncsn.evaluation.extractors import Extracted
from ncsn.evaluation.reference import load_reference, publish_reference

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 1), dtype=np.uint8)


def extract(images: np.ndarray) -> Extracted:
    """Three features and two classes that can be worked out by hand."""
    pixels = images.reshape(len(images), -1).astype(np.float32)
    features = np.stack([pixels.mean(1), pixels.min(1), pixels.max(1)], axis=1)
    bright = np.where(features[:, 0] > 127, 0.9, 0.2)
    return Extracted(features=features, log_probabilities=np.log(np.stack([bright, 1 - bright], axis=1)))


def test_holds_all_features_their_moments_and_the_histogram(tmp_path: Path) -> None:
    extracted, store = extract(IMAGES), str(tmp_path)
    publish_reference(store, "f" * 64, extracted, batch_size=7, origin={"split": "train"})
    reference = load_reference(store, "f" * 64)
    assert reference is not None and load_reference(store, "e" * 64) is None
    np.testing.assert_array_equal(reference.features, extracted.features)
    np.testing.assert_allclose(reference.statistics.mean, extracted.features.mean(0), rtol=1e-6)
    np.testing.assert_allclose(reference.statistics.covariance, np.cov(extracted.features, rowvar=False), rtol=1e-5)
    bright = (IMAGES.mean((1, 2, 3)) > 127).mean()
    np.testing.assert_allclose(reference.class_histogram, [bright, 1 - bright])


def test_a_failed_computation_leaves_nothing(tmp_path: Path) -> None:
    seen = extract(IMAGES)
    seen.features[0] = np.nan
    with pytest.raises(ValueError, match="1 of 7"):
        publish_reference(str(tmp_path), "f" * 64, seen, batch_size=7, origin={"split": "train"})
    assert list((tmp_path / "reference").iterdir()) == []
