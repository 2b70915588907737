"""The reference is stored once per extractor and dataset."""

from pathlib import Path

import numpy as np
import pytest

from ncsn.evaluation.extractors.base import Extracted, fingerprint_of
from ncsn.evaluation.reference import Reference, load_reference, publish_reference

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 1), dtype=np.uint8)


class MomentExtractor:
    """Three features and two classes that can be worked out by hand."""

    name = "moments"
    num_features = 3

    fingerprint = "f"

    def extract(self, images: np.ndarray) -> Extracted:
        pixels = images.reshape(len(images), -1).astype(np.float32)
        features = np.stack([pixels.mean(1), pixels.min(1), pixels.max(1)], axis=1)
        bright = np.where(features[:, 0] > 127, 0.9, 0.2)
        return Extracted(features=features, log_probabilities=np.log(np.stack([bright, 1 - bright], axis=1)))


def publish(folder: Path, *, fingerprint: str = "f" * 64, extracted: Extracted | None = None) -> Reference:
    extracted = extracted or MomentExtractor().extract(IMAGES)
    publish_reference(str(folder), fingerprint, extracted, batch_size=7, origin={"split": "train"})
    reference = load_reference(str(folder), fingerprint)
    assert reference is not None
    return reference


def test_holds_all_features_their_moments_and_the_histogram(tmp_path: Path) -> None:
    reference = publish(tmp_path)
    extracted = MomentExtractor().extract(IMAGES)
    np.testing.assert_array_equal(reference.features, extracted.features)
    np.testing.assert_allclose(reference.statistics.mean, extracted.features.mean(0), rtol=1e-6)
    np.testing.assert_allclose(reference.statistics.covariance, np.cov(extracted.features, rowvar=False), rtol=1e-5)
    bright = (IMAGES.mean((1, 2, 3)) > 127).mean()
    np.testing.assert_allclose(reference.class_histogram, [bright, 1 - bright])


def test_is_found_by_its_fingerprint_alone(tmp_path: Path) -> None:
    publish(tmp_path)
    assert load_reference(str(tmp_path), "e" * 64) is None


def test_a_failed_computation_leaves_nothing(tmp_path: Path) -> None:
    seen = MomentExtractor().extract(IMAGES)
    seen.features[0] = np.nan
    with pytest.raises(ValueError, match="1 of 7"):
        publish(tmp_path, extracted=seen)
    assert list((tmp_path / "reference").iterdir()) == []


def test_fingerprints_depend_on_every_part_but_not_on_their_order() -> None:
    assert fingerprint_of(kind="a", version=1) == fingerprint_of(version=1, kind="a")
    assert fingerprint_of(kind="a", version=1) != fingerprint_of(kind="a", version=2)
    assert len(fingerprint_of(kind="a")) == 64
