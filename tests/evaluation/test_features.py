"""Features batch by batch are those of one pass, in any process and any order; those of the reference are stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_networks import tiny_config

from ncsn.config import Config
from ncsn.data.dataset import write_dataset
from ncsn.data.format import Rows, to_table
from ncsn.data.samples import SampleSet
from ncsn.data.sources import open_source
from ncsn.data.training_images import open_cache
from ncsn.evaluation import features as module
from ncsn.evaluation.extractors import Extracted
from ncsn.evaluation.features import SplitSet, extract_set
from ncsn.evaluation.reference import load_reference, publish_reference
from ncsn.progress import Progress


class Brightness:
    """An extractor whose features show the image and the size of its batch."""

    def extract(self, images: np.ndarray) -> Extracted:
        features = np.stack([images.mean((1, 2, 3)), np.full(len(images), len(images))], axis=1).astype(np.float32)
        return Extracted(features=features, log_probabilities=np.log(np.full((len(images), 2), 0.5)))


@pytest.fixture(scope="module")
def config() -> Config:
    return tiny_config("data.test_fraction=0.3", "data.max_images=120", "evaluation.batch_size=8")


@pytest.fixture(scope="module")
def dataset(config: Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("data"))
    return write_dataset(open_source(config.data), folder, name="digits", data=config.data).uri


@pytest.fixture
def samples(dataset: str, tmp_path: Path) -> SampleSet:
    """Seventy images in shards of 20 and 13, of which 61 are wanted."""
    images, first = open_cache(dataset, "train").images, 0
    for count in (20, 13, 20, 17):
        part = np.ascontiguousarray(images[first : first + count])
        table = to_table(Rows(part, np.full(count, -1)))
        pq.write_table(table, tmp_path / f"shard-{first:09d}-{first + count:09d}.parquet")
        first += count
    return SampleSet(str(tmp_path), 61)


def backwards(function, items, *, gpu):
    return ((item, function(item)) for item in reversed(items))


def test_no_batch_holds_images_of_two_shards(config, dataset, samples, monkeypatch) -> None:
    monkeypatch.setattr(module, "extractor_of", lambda *_: Brightness())
    whole, sizes = open_cache(dataset, "train").images[:61], [8, 8, 4, 8, 5, 8, 8, 4, 8]
    progress = Progress()
    progress.start(100, "images")
    extracted = extract_set(config, dataset, samples, runner=backwards, progress=progress)
    assert progress.done == 61 and extracted.log_probabilities.shape == (61, 2)
    np.testing.assert_array_equal(extracted.features[:, 0], whole.mean((1, 2, 3)).astype(np.float32))
    np.testing.assert_array_equal(extracted.features[:, 1], np.repeat(sizes, sizes))
    np.testing.assert_array_equal(samples.read(0, 30), whole[:30])


def test_drawn_images_have_their_labels(dataset: str) -> None:
    drawn, split = SplitSet(dataset, "test", 30, drawn=True), open_cache(dataset, "test")
    whole = drawn.read(0, 30)
    np.testing.assert_array_equal(drawn.read(8, 16), whole[8:16])
    for image, label in zip(whole, drawn.labels(), strict=True):
        assert label in split.labels[np.flatnonzero((split.images == image).all(axis=(1, 2, 3)))]
    np.testing.assert_array_equal(SplitSet(dataset, "test", 9).labels(), split.labels[:9])
    np.testing.assert_array_equal(SplitSet(dataset, "test", 9).read(2, 9), split.images[2:9])


IMAGES = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 1), dtype=np.uint8)


def extract(images: np.ndarray) -> Extracted:
    """Three features and two classes that can be worked out by hand."""
    pixels = images.reshape(len(images), -1).astype(np.float32)
    features = np.stack([pixels.mean(1), pixels.min(1), pixels.max(1)], axis=1)
    bright = np.where(features[:, 0] > 127, 0.9, 0.2)
    return Extracted(features=features, log_probabilities=np.log(np.stack([bright, 1 - bright], axis=1)))


def test_holds_all_features_their_moments_and_the_histogram(tmp_path: Path) -> None:
    extracted, uri = extract(IMAGES), str(tmp_path / "reference")
    publish_reference(uri, extracted, batch_size=7, origin={"fingerprint": "f" * 64, "gaussian": 1.0})
    reference = load_reference(uri)
    assert reference is not None and load_reference(str(tmp_path)) is None
    assert (reference.fingerprint, reference.gaussian) == ("f" * 64, 1.0)
    np.testing.assert_array_equal(reference.features, extracted.features)
    np.testing.assert_allclose(reference.statistics.mean, extracted.features.mean(0), rtol=1e-6)
    np.testing.assert_allclose(reference.statistics.covariance, np.cov(extracted.features, rowvar=False), rtol=1e-5)
    bright = (IMAGES.mean((1, 2, 3)) > 127).mean()
    np.testing.assert_allclose(reference.class_histogram, [bright, 1 - bright])


def test_a_failed_computation_leaves_nothing(tmp_path: Path) -> None:
    seen = extract(IMAGES)
    seen.features[0] = np.nan
    with pytest.raises(ValueError, match="1 of 7"):
        publish_reference(str(tmp_path / "reference"), seen, batch_size=7, origin={"fingerprint": "", "gaussian": 1.0})
    assert list(tmp_path.iterdir()) == []
