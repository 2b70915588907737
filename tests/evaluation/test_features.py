"""Features batch by batch are those of one pass, in any process and any order; those of the reference are stored."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_networks import tiny_config

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

CONFIG = tiny_config("data.test_fraction=0.3", "data.max_images=120", "evaluation.batch_size=8")


class Brightness:
    """An extractor whose features show the image and the size of its batch."""

    def extract(self, images: np.ndarray) -> Extracted:
        features = np.stack([images.mean((1, 2, 3)), np.full(len(images), len(images))], axis=1).astype(np.float32)
        return Extracted(features=features, log_probabilities=np.log(np.full((len(images), 2), 0.5)))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("data"))
    return write_dataset(open_source(CONFIG.data), folder, name="digits", data=CONFIG.data).uri


def test_no_batch_holds_images_of_two_shards(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of seventy images in shards of 20 and 13 and so on, of which 61 are wanted, in any order."""
    images, first = np.asarray(open_cache(dataset, "train").images), 0
    for count in (20, 13, 20, 17):
        shard = tmp_path / f"shard-{first:09d}-{first + count:09d}.parquet"
        pq.write_table(to_table(Rows(images[first : first + count], np.full(count, -1))), shard)
        first += count
    monkeypatch.setattr(module, "extractor_of", lambda *_: Brightness())
    samples, sizes, progress = SampleSet(str(tmp_path), 61), [8, 8, 4, 8, 5, 8, 8, 4, 8], Progress(total=100)

    def backwards(function, items, *, gpu):
        return ((item, function(item)) for item in reversed(items))

    extracted = extract_set(CONFIG, dataset, samples, runner=backwards, progress=progress)
    assert progress.done == 61 and extracted.log_probabilities.shape == (61, 2)
    np.testing.assert_array_equal(extracted.features[:, 0], images[:61].mean((1, 2, 3)).astype(np.float32))
    np.testing.assert_array_equal(extracted.features[:, 1], np.repeat(sizes, sizes))
    np.testing.assert_array_equal(samples.read(0, 30), images[:30])


def test_drawn_images_have_their_labels(dataset: str) -> None:
    drawn, split = SplitSet(dataset, "test", 30, drawn=True), open_cache(dataset, "test")
    whole = drawn.read(0, 30)
    np.testing.assert_array_equal(drawn.read(8, 16), whole[8:16])
    for image, label in zip(whole, drawn.labels(), strict=True):
        assert label in split.labels[np.flatnonzero((split.images == image).all(axis=(1, 2, 3)))]
    stored = SplitSet(dataset, "test", 9)
    np.testing.assert_array_equal(stored.labels(), split.labels[:9])
    np.testing.assert_array_equal(stored.read(2, 9), split.images[2:9])


def test_a_reference_holds_all_features_their_moments_and_the_histogram_or_nothing(tmp_path: Path) -> None:
    rng, uri = np.random.default_rng(0), str(tmp_path / "reference")
    features, sure = rng.standard_normal((50, 3)).astype(np.float32), rng.uniform(0.01, 0.99, 50)
    extracted = Extracted(features, np.log(np.stack([sure, 1 - sure], axis=1)))
    failed, origin = replace(extracted, features=features * np.nan), {"fingerprint": "f" * 64, "gaussian": 1.0}
    with pytest.raises(ValueError, match="7 of 7"):
        publish_reference(uri, failed, batch_size=7, origin=origin)
    assert list(tmp_path.iterdir()) == [] and load_reference(uri) is None
    publish_reference(uri, extracted, batch_size=7, origin=origin)
    reference = load_reference(uri)
    assert (reference.fingerprint, reference.gaussian) == ("f" * 64, 1.0)
    np.testing.assert_array_equal(reference.features, features)
    np.testing.assert_allclose(reference.statistics.mean, features.mean(0), rtol=1e-5)
    np.testing.assert_allclose(reference.statistics.covariance, np.cov(features, rowvar=False), rtol=1e-5)
    np.testing.assert_allclose(reference.class_histogram, [(sure > 0.5).mean(), (sure <= 0.5).mean()])
