"""The reference is computed once per extractor and data set, in batches that do not matter."""

from pathlib import Path

import numpy as np
import pytest

from ncsn.evaluation.extractors import Extracted, fingerprint_of
from ncsn.evaluation.reference import extract_all, obtain_reference

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 1), dtype=np.uint8)


class MomentExtractor:
    """Three features and two classes that can be worked out by hand."""

    name = "moments"
    num_features = 3

    def __init__(self, fingerprint: str = "f") -> None:
        self.fingerprint = fingerprint
        self.calls = 0

    def extract(self, images: np.ndarray) -> Extracted:
        self.calls += 1
        pixels = images.reshape(len(images), -1).astype(np.float32)
        features = np.stack([pixels.mean(1), pixels.min(1), pixels.max(1)], axis=1)
        bright = np.where(features[:, 0] > 127, 0.9, 0.2)
        return Extracted(features=features, log_probabilities=np.log(np.stack([bright, 1 - bright], axis=1)))


def test_holds_all_features_their_moments_and_the_histogram(tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    reference = obtain_reference(
        str(tmp_path),
        MomentExtractor(),
        images=IMAGES,
        dataset_digest="d",
        batch_size=7,
        on_progress=lambda *call: done.append(call),
    )
    extracted = MomentExtractor().extract(IMAGES)
    np.testing.assert_array_equal(reference.features, extracted.features)
    np.testing.assert_allclose(reference.statistics.mean, extracted.features.mean(0), rtol=1e-6)
    np.testing.assert_allclose(reference.statistics.covariance, np.cov(extracted.features, rowvar=False), rtol=1e-5)
    bright = (IMAGES.mean((1, 2, 3)) > 127).mean()
    np.testing.assert_allclose(reference.class_histogram, [bright, 1 - bright])
    assert done[-1] == (50, 50)


def test_is_computed_once_and_told_apart_by_extractor_data_and_split(tmp_path: Path) -> None:
    def obtain(extractor: MomentExtractor, **changes: str) -> str:
        settings = {"dataset_digest": "d", "split": "train"} | changes
        return obtain_reference(str(tmp_path), extractor, images=IMAGES, **settings).fingerprint

    first, again = MomentExtractor(), MomentExtractor()
    fingerprints = {obtain(first)}
    assert obtain(again) in fingerprints
    assert (first.calls, again.calls) == (1, 0)
    fingerprints |= {obtain(MomentExtractor("other")), obtain(first, dataset_digest="e"), obtain(first, split="test")}
    assert len(fingerprints) == 4


def test_a_failed_computation_leaves_nothing(tmp_path: Path) -> None:
    class Broken(MomentExtractor):
        def extract(self, images: np.ndarray) -> Extracted:
            extracted = super().extract(images)
            extracted.features[0] = np.nan
            return extracted

    with pytest.raises(ValueError, match="1 of 50 feature vectors hold NaN"):
        obtain_reference(str(tmp_path), Broken(), images=IMAGES, dataset_digest="d")
    assert list((tmp_path / "reference").iterdir()) == []


def test_extraction_of_a_stream_keeps_its_order() -> None:
    counts: list[int] = []
    extracted = extract_all(MomentExtractor(), iter([IMAGES[:20], IMAGES[20:]]), on_images=counts.append)
    np.testing.assert_array_equal(extracted.features, MomentExtractor().extract(IMAGES).features)
    assert counts == [20, 30]
    with pytest.raises(ValueError, match="no images to evaluate"):
        extract_all(MomentExtractor(), iter([]))


def test_fingerprints_depend_on_every_part_but_not_on_their_order() -> None:
    assert fingerprint_of(kind="a", version=1) == fingerprint_of(version=1, kind="a")
    assert fingerprint_of(kind="a", version=1) != fingerprint_of(kind="a", version=2)
    assert len(fingerprint_of(kind="a")) == 64
