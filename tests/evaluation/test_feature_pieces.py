"""Features piece by piece: the batches of one pass, whatever the pieces, and only what is missing is made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ncsn.config import Config, from_yaml
from ncsn.data.format import Rows, to_table
from ncsn.data.parquet import write_dataset
from ncsn.data.samples import read_samples
from ncsn.data.sources.known import open_source
from ncsn.data.training_images import open_cache
from ncsn.evaluation import pieces as module
from ncsn.evaluation.extractors.base import Extracted
from ncsn.evaluation.pieces import FeaturePiece, SampleSet, SplitSet, extract_piece, feature_pieces, missing_pieces

CONFIG = """
name: pieces
data: {source: sklearn_digits, image_size: 8, channels: 1, test_fraction: 0.3, max_images: 120}
noise: {num_levels: 4}
network: {kind: unet, widths: [8]}
train: {num_images: 128, checkpoint_every_images: 128, report_every_images: 128}
sampling: {sampler: {kind: annealed_langevin}}
evaluation: {batch_size: 8}
"""


class Batches:
    """An extractor that shows which batches it was given."""

    name, fingerprint, num_features = "batches", "b", 2

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def extract(self, images: np.ndarray) -> Extracted:
        self.sizes.append(len(images))
        features = np.stack([images.mean((1, 2, 3)), np.full(len(images), len(images))], axis=1).astype(np.float32)
        return Extracted(features=features, log_probabilities=np.log(np.full((len(images), 2), 0.5)))


@pytest.fixture(scope="module")
def config() -> Config:
    return from_yaml(CONFIG)


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


def pieces_of(config: Config, dataset: str, images: SampleSet | SplitSet, near: Path) -> list[FeaturePiece]:
    return feature_pieces(config, dataset, images, near=str(near), fingerprint="b")


def test_pieces_hold_every_image_once_and_cut_no_batch(
    config: Config, dataset: str, samples: SampleSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(read_samples(samples.uri, num_images=61, batch_size=8))
    assert [len(batch) for batch in whole] == [8, 8, 4, 8, 5, 8, 8, 4, 8]
    for size in (1, 16, 21, 1000):
        monkeypatch.setattr(module, "PIECE_IMAGES", size)
        pieces = pieces_of(config, dataset, samples, tmp_path)
        batches = [batch for piece in pieces for batch in samples.read(piece.first, piece.last, batch_size=8)]
        assert [len(batch) for batch in batches] == [len(batch) for batch in whole]
        np.testing.assert_array_equal(np.concatenate(batches), np.concatenate(whole))
        assert all(len(piece) <= max(size, 8) for piece in pieces)
    np.testing.assert_array_equal(samples.head(256), np.concatenate(whole))
    np.testing.assert_array_equal(samples.head(30), np.concatenate(whole)[:30])


def test_drawn_images_are_the_same_from_any_piece(config: Config, dataset: str, tmp_path: Path, monkeypatch) -> None:
    drawn = SplitSet(dataset, "test", 30, drawn=0)
    whole = np.concatenate(list(drawn.read(0, 30, batch_size=8)))
    monkeypatch.setattr(module, "PIECE_IMAGES", 10)
    pieces = pieces_of(config, dataset, drawn, tmp_path)
    assert [(piece.first, piece.last) for piece in pieces] == [(0, 8), (8, 16), (16, 24), (24, 30)]
    read = [np.concatenate(list(drawn.read(piece.first, piece.last, batch_size=8))) for piece in pieces]
    np.testing.assert_array_equal(np.concatenate(read), whole)
    np.testing.assert_array_equal(drawn.head(5), whole[:5])
    split = open_cache(dataset, "test")
    for image, label in zip(whole, drawn.labels(), strict=True):
        rows = np.flatnonzero((split.images == image).all(axis=(1, 2, 3)))
        assert label in split.labels[rows]
    np.testing.assert_array_equal(SplitSet(dataset, "test", 9).labels(), split.labels[:9])


def test_only_missing_pieces_are_extracted(config: Config, dataset: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "PIECE_IMAGES", 16)
    train = SplitSet(dataset, "train", 40)
    pieces, extractor, told = pieces_of(config, dataset, train, tmp_path), Batches(), list[int]()
    assert missing_pieces(pieces) == pieces
    second = extract_piece(pieces[1], lambda: extractor, on_images=told.append)
    assert missing_pieces(pieces) == [pieces[0], pieces[2]]
    again = extract_piece(pieces[1], lambda: extractor, on_images=told.append)
    np.testing.assert_array_equal(again.features, second.features)
    np.testing.assert_array_equal(again.log_probabilities, second.log_probabilities)
    assert (extractor.sizes, told) == ([8, 8], [8, 8, 16])


def test_other_images_or_another_extractor_have_another_folder(config: Config, dataset: str, tmp_path: Path) -> None:
    sets = (SplitSet(dataset, "train", 40), SplitSet(dataset, "train", 39), SplitSet(dataset, "train", 40, drawn=0))
    folders = {pieces_of(config, dataset, images, tmp_path)[0].folder for images in sets}
    folders.add(feature_pieces(config, dataset, sets[0], near=str(tmp_path), fingerprint="c")[0].folder)
    larger = from_yaml(CONFIG, overrides=["evaluation.batch_size=9"])
    folders.add(pieces_of(larger, dataset, sets[0], tmp_path)[0].folder)
    assert len(folders) == 5
