"""Samples come back from their shards in order of index."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ncsn.data.row import Images, to_table
from ncsn.evaluation.samples import read_samples, samples_shape

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)


def write_shard(folder: Path, first: int, last: int, *, named: tuple[int, int] | None = None) -> None:
    start, end = named or (first, last)
    rows = Images(IMAGES[first:last], np.full(last - first, -1))
    pq.write_table(to_table(rows), folder / f"shard-{start:09d}-{end:09d}.parquet")


def read(folder: Path, count: int, batch_size: int = 6) -> np.ndarray:
    return np.concatenate(list(read_samples(str(folder), num_images=count, batch_size=batch_size)))


def test_overlapping_shards_give_each_image_once(tmp_path: Path) -> None:
    for first, last in [(0, 5), (3, 9), (4, 8), (9, 20)]:
        write_shard(tmp_path, first, last)
    (tmp_path / "manifest.json").write_text("{}")
    np.testing.assert_array_equal(read(tmp_path, 20), IMAGES)
    np.testing.assert_array_equal(read(tmp_path, 7), IMAGES[:7])
    assert samples_shape(str(tmp_path), num_images=20) == (4, 4, 3)
    for start, stop in [(2, 7), (5, 20), (9, 10)]:
        part = np.concatenate(list(read_samples(str(tmp_path), start=start, num_images=stop, batch_size=3)))
        np.testing.assert_array_equal(part, IMAGES[start:stop])
    batches = list(read_samples(str(tmp_path), num_images=20, batch_size=4))
    assert max(map(len, batches)) == 4


def test_gaps_and_missing_folders_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not hold image 0; run the sample step"):
        read(tmp_path, 5)
    write_shard(tmp_path, 0, 5)
    write_shard(tmp_path, 8, 20)
    with pytest.raises(ValueError, match="holds images 0 to 4 without a gap, but 6 are to be evaluated"):
        read(tmp_path, 6)
    with pytest.raises(ValueError, match="but 6 are to be evaluated"):
        samples_shape(str(tmp_path), num_images=6)
    np.testing.assert_array_equal(read(tmp_path, 5), IMAGES[:5])
    with pytest.raises(ValueError, match="does not hold image 6; run the sample step"):
        list(read_samples(str(tmp_path), start=6, num_images=9, batch_size=3))
    with pytest.raises(FileNotFoundError, match="no samples folder at"):
        read(tmp_path / "nowhere", 5)


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, 5, named=(0, 7))
    with pytest.raises(ValueError, match=r"shard-000000000-000000007.parquet holds 5 images, its name says 7"):
        read(tmp_path, 6)
    damaged = tmp_path / "shard-000000000-000000007.parquet"
    damaged.write_bytes(damaged.read_bytes()[:100])
    for reading in (read, lambda folder, count: samples_shape(str(folder), num_images=count)):
        with pytest.raises(ValueError, match="is not a readable shard of samples"):
            reading(tmp_path, 6)
    pq.write_table(pa.table({"image": [1] * 7}), damaged)
    with pytest.raises(ValueError, match="column 'image' is int64, expected a fixed-shape tensor of uint8"):
        read(tmp_path, 6)
