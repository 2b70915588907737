"""Samples come back from their shards in order of index."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from refused import refused

from ncsn.config.schema import Pixels
from ncsn.data.format import Rows, to_table
from ncsn.data.samples import SampleSet, missing_ranges, write_pngs
from ncsn.errors import NotFound

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)


def write_shard(folder: Path, first: int, last: int, *, named: tuple[int, int] | None = None) -> None:
    start, end = named or (first, last)
    rows = Rows(IMAGES[first:last], np.full(last - first, -1))
    pq.write_table(to_table(rows), folder / f"shard-{start:09d}-{end:09d}.parquet")


def test_overlapping_shards_give_each_image_once_also_as_png_files(tmp_path: Path) -> None:
    shards, pictures = tmp_path / "shards", tmp_path / "pictures"
    shards.mkdir()
    for first, last in [(0, 5), (3, 9), (4, 8), (9, 20)]:
        write_shard(shards, first, last)
    (shards / "manifest.json").write_text("{}")
    assert missing_ranges([file.name for file in shards.iterdir()], num_images=22) == [(20, 22)]
    assert SampleSet(str(shards), 20).pixels() == Pixels((4, 4, 3))
    for first, last in [(0, 20), (0, 7), (2, 7), (5, 20), (9, 10)]:
        np.testing.assert_array_equal(SampleSet(str(shards), last).read(first, last), IMAGES[first:last])
    pictures.mkdir()
    write_pngs(str(shards), pictures, num_images=18)
    files = sorted(pictures.iterdir())
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(18)]
    np.testing.assert_array_equal(np.stack([np.array(Image.open(file)) for file in files]), IMAGES[:18])
    assert len(list(tmp_path.iterdir())) == 2


def test_gaps_and_missing_folders_say_what_is_missing(tmp_path: Path) -> None:
    with refused(str(tmp_path)):
        SampleSet(str(tmp_path), 5).read(0, 5)
    write_shard(tmp_path, 0, 5)
    write_shard(tmp_path, 8, 20)
    names = [file.name for file in tmp_path.iterdir()]
    for count, gaps in ((4, []), (7, [(5, 7)]), (22, [(5, 8), (20, 22)])):
        assert missing_ranges([*names, "manifest.json"], num_images=count) == gaps
    with refused(str(tmp_path)) as caught:
        SampleSet(str(tmp_path), 6).read(0, 6)
    assert "image 5 of the 6" in caught.value.problems[0].reason
    with refused(str(tmp_path)):
        SampleSet(str(tmp_path), 6).pixels()
    with refused(str(tmp_path)):
        SampleSet(str(tmp_path), 9).read(6, 9)
    with refused(str(tmp_path / "nowhere"), error=NotFound):
        SampleSet(str(tmp_path / "nowhere"), 5).read(0, 5)


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, 5, named=(0, 7))
    damaged = tmp_path / "shard-000000000-000000007.parquet"
    content = damaged.read_bytes()[:100]
    for damage in (
        lambda: None,
        lambda: damaged.write_bytes(content),
        lambda: pq.write_table(pa.table({"image": [1] * 7}), damaged),
    ):
        damage()
        for reading in (lambda: SampleSet(str(tmp_path), 6).read(0, 6), lambda: SampleSet(str(tmp_path), 6).pixels()):
            with refused(str(damaged)):
                reading()
