"""Samples come back from their shards in order of index."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refused import refused

from ncsn.data.format import Rows, to_table
from ncsn.data.samples import missing_ranges, read_samples, samples_shape
from ncsn.errors import NotFound

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)


def write_shard(folder: Path, first: int, last: int, *, named: tuple[int, int] | None = None) -> None:
    start, end = named or (first, last)
    rows = Rows(IMAGES[first:last], np.full(last - first, -1))
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
    with refused(str(tmp_path)):
        read(tmp_path, 5)
    write_shard(tmp_path, 0, 5)
    write_shard(tmp_path, 8, 20)
    with refused(str(tmp_path)) as caught:
        read(tmp_path, 6)
    assert "0 to 4" in caught.value.problems[0].reason
    with refused(str(tmp_path)):
        samples_shape(str(tmp_path), num_images=6)
    np.testing.assert_array_equal(read(tmp_path, 5), IMAGES[:5])
    with refused(str(tmp_path)):
        list(read_samples(str(tmp_path), start=6, num_images=9, batch_size=3))
    with refused(str(tmp_path / "nowhere"), error=NotFound):
        read(tmp_path / "nowhere", 5)


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, 5, named=(0, 7))
    with refused(str(tmp_path / "shard-000000000-000000007.parquet")):
        read(tmp_path, 6)
    damaged = tmp_path / "shard-000000000-000000007.parquet"
    damaged.write_bytes(damaged.read_bytes()[:100])
    for reading in (read, lambda folder, count: samples_shape(str(folder), num_images=count)):
        with refused(str(damaged)):
            reading(tmp_path, 6)
    pq.write_table(pa.table({"image": [1] * 7}), damaged)
    with refused(str(damaged)):
        read(tmp_path, 6)


@pytest.mark.parametrize(
    ("names", "gaps"),
    [
        ([], [(0, 10)]),
        (["shard-000000000-000000004.parquet"], [(4, 10)]),
        (["shard-000000004-000000008.parquet", "manifest.json"], [(0, 4), (8, 10)]),
        (["shard-000000000-000000020.parquet"], []),
        (["shard-000000012-000000020.parquet"], [(0, 10)]),
    ],
)
def test_missing_ranges(names: list[str], gaps: list[tuple[int, int]]) -> None:
    assert missing_ranges(names, num_images=10) == gaps
