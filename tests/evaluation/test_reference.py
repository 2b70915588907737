"""The reference is stored once per extractor and dataset and does not depend on its pieces; the spool."""

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ncsn.errors import InvalidValue
from ncsn.evaluation.extractors.base import Extracted, extract_all, fingerprint_of
from ncsn.evaluation.frechet import FrechetStatistics, RunningDistance
from ncsn.evaluation.pieces import Spool
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


def publish(folder: Path, *, pieces: list[int], fingerprint: str = "f" * 64) -> Reference:
    """Of the images cut at these indices."""
    borders = [0, *pieces, len(IMAGES)]
    seen = [MomentExtractor().extract(IMAGES[first:last]) for first, last in itertools.pairwise(borders)]
    publish_reference(str(folder), fingerprint, seen, shape=(50, 3), batch_size=7, origin={"split": "train"})
    reference = load_reference(str(folder), fingerprint)
    assert reference is not None
    return reference


def test_holds_all_features_their_moments_and_the_histogram(tmp_path: Path) -> None:
    reference = publish(tmp_path, pieces=[14, 35])
    extracted = MomentExtractor().extract(IMAGES)
    np.testing.assert_array_equal(reference.features, extracted.features)
    np.testing.assert_allclose(reference.statistics.mean, extracted.features.mean(0), rtol=1e-6)
    np.testing.assert_allclose(reference.statistics.covariance, np.cov(extracted.features, rowvar=False), rtol=1e-5)
    bright = (IMAGES.mean((1, 2, 3)) > 127).mean()
    np.testing.assert_allclose(reference.class_histogram, [bright, 1 - bright])


def test_pieces_of_whole_batches_change_no_bit(tmp_path: Path) -> None:
    one, many = publish(tmp_path / "one", pieces=[]), publish(tmp_path / "many", pieces=[7, 21, 49])
    np.testing.assert_array_equal(one.statistics.scatter, many.statistics.scatter)
    np.testing.assert_array_equal(one.statistics.mean, many.statistics.mean)
    np.testing.assert_array_equal(one.class_histogram, many.class_histogram)


def test_is_found_by_its_fingerprint_alone(tmp_path: Path) -> None:
    publish(tmp_path, pieces=[])
    assert load_reference(str(tmp_path), "e" * 64) is None


def test_a_failed_computation_leaves_nothing(tmp_path: Path) -> None:
    seen = MomentExtractor().extract(IMAGES)
    seen.features[0] = np.nan
    with pytest.raises(ValueError, match="1 of 7"):
        publish_reference(str(tmp_path), "f" * 64, [seen], shape=(50, 3), batch_size=7, origin={})
    assert list((tmp_path / "reference").iterdir()) == []


def test_extraction_of_a_stream_keeps_its_order() -> None:
    counts: list[int] = []
    extracted = extract_all(MomentExtractor(), iter([IMAGES[:20], IMAGES[20:]]), on_images=counts.append)
    np.testing.assert_array_equal(extracted.features, MomentExtractor().extract(IMAGES).features)
    assert counts == [20, 30]
    with pytest.raises(InvalidValue):
        extract_all(MomentExtractor(), iter([]))


def test_fingerprints_depend_on_every_part_but_not_on_their_order() -> None:
    assert fingerprint_of(kind="a", version=1) == fingerprint_of(version=1, kind="a")
    assert fingerprint_of(kind="a", version=1) != fingerprint_of(kind="a", version=2)
    assert len(fingerprint_of(kind="a")) == 64


def test_a_spool_keeps_features_out_of_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    reference, seen = FrechetStatistics.of(rng.standard_normal((5000, 4))), rng.standard_normal((500, 4)).astype("f4")
    log_p = np.log(np.full((500, 3), 1 / 3))

    def peak(batches: int) -> int:
        (tmp_path / str(batches)).mkdir()
        tracemalloc.start()
        count = 500 * batches
        spool, running = Spool(tmp_path / str(batches), count=count), RunningDistance(reference, count=count)
        for _ in range(batches):
            spool.add(Extracted(seen, log_p))
            running.add(running.count, spool.extracted.features[running.count :])
        assert np.array_equal(spool.extracted.features, np.tile(seen, (batches, 1)))
        assert spool.extracted.log_probabilities.shape == (500 * batches, 3)
        assert running.count == 500 * batches
        used = tracemalloc.get_traced_memory()[1] - 500 * batches * 4 * 5  # np.tile and the comparison
        tracemalloc.stop()
        return used

    assert peak(200) < 2 * peak(5) + 100_000
    with pytest.raises(InvalidValue):
        _ = Spool(tmp_path, count=5).extracted
