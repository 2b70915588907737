"""The stream of windows: every image once an epoch, one order for all, and only windows on the disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ncsn.data.parquet import read_rows, read_split, write_dataset
from ncsn.data.source import Example, Source, Split
from ncsn.data.training_images import StreamedSplit, window_at


@pytest.mark.parametrize(("size", "window"), [(1000, 160), (1007, 160), (100, 160), (33, 16), (7, 64)])
def test_each_epoch_has_every_image_once_in_an_order_of_its_own(size, window):
    orders = []
    for epoch in range(3):
        rows, place = [], epoch * size
        while place < (epoch + 1) * size:
            found = window_at(5, place, size=size, window_images=window)
            assert found.first == place
            assert len(found.rows) <= max(window, 16)
            rows += found.rows.tolist()
            place = found.last
        assert place == (epoch + 1) * size
        assert sorted(rows) == list(range(size))
        orders.append(rows)
    assert len({tuple(order) for order in orders}) == 3
    assert window_at(6, 0, size=size, window_images=window).rows.tolist() != orders[0][: min(size, window)]


def test_any_place_of_a_window_finds_it():
    for place in (0, 159, 160, 999, 1006, 1007, 1500):
        found = window_at(1, place, size=1007, window_images=160)
        assert found.first <= place < found.last
        again = window_at(1, found.first, size=1007, window_images=160)
        assert (again.first, again.rows.tolist()) == (found.first, found.rows.tolist())


def test_a_window_mixes_places_of_the_whole_split():
    rows = window_at(0, 0, size=100_000, window_images=1600).rows
    assert np.unique(rows // 100).size == 16
    assert np.ptp(rows) > 50_000


@pytest.fixture
def numbered(tmp_path, data_config):
    """Writes 500 and 20 images whose first two pixels are their number."""

    def make(rows_per_part: int) -> str:
        def split(count: int) -> Split:
            def stream():
                for number in range(count):
                    image = np.zeros((8, 8, 1), np.uint8)
                    image[0, :2, 0] = divmod(number, 256)
                    yield Example(image, number % 10)

            return Split(count, stream)

        source = Source("numbers", "none", tuple("0123456789"), {"train": split(500), "test": split(20)})
        data = data_config("image_folder", rows_per_part=rows_per_part)
        return write_dataset(source, str(tmp_path / f"store-{rows_per_part}"), name="numbers", data=data).uri

    return make


def numbers(images: np.ndarray) -> list[int]:
    return (images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 1, 0]).tolist()


def test_a_range_of_rows_is_read_over_parts_and_row_groups(numbered, monkeypatch):
    monkeypatch.setattr("ncsn.data.parquet._BLOCK_BYTES", 7 * 64)
    uri = numbered(30)
    manifest = StreamedSplit(uri, "train", window_images=64)._manifest
    for first, count in ((0, 500), (0, 1), (29, 2), (13, 100), (499, 1)):
        rows = read_rows(uri, "train", first=first, count=count, manifest=manifest)
        assert numbers(rows.images) == list(range(first, first + count))
        assert rows.labels.tolist() == [number % 10 for number in range(first, first + count)]


def test_workers_resumes_and_part_files_change_nothing(numbered, tmp_path):
    uri = numbered(30)

    def open_stream(name: str, uri: str = uri) -> StreamedSplit:
        return StreamedSplit(uri, "train", window_images=64, cache_dir=tmp_path / name)

    places = [window_at(3, place, size=500, window_images=64) for place in range(1200)]
    expected = [int(window.rows[place - window.first]) for place, window in enumerate(places)]
    alone = open_stream("a")
    assert (
        numbers(np.concatenate([alone.ordered(3, first=first, count=40) for first in range(0, 1200, 40)])) == expected
    )
    pair = [open_stream("shared"), open_stream("shared")]  # two workers of one node, half a batch each
    shared = [
        worker.ordered(3, first=first + 20 * rank, count=20)
        for first in range(0, 1200, 40)
        for rank, worker in enumerate(pair)
    ]
    assert numbers(np.concatenate(shared)) == expected
    assert numbers(open_stream("resumed").ordered(3, first=777, count=100)) == expected[777:877]
    assert numbers(open_stream("other", numbered(16384)).ordered(3, first=0, count=1200)) == expected
    assert np.array_equal(alone.head(7), read_split(uri, "train").images[:7])
    assert len(alone) == 500


def test_only_windows_are_on_the_disk(numbered, tmp_path):
    stream = StreamedSplit(numbered(30), "train", window_images=64, cache_dir=tmp_path / "cache")
    most = 0
    for first in range(0, 1000, 10):
        stream.ordered(0, first=first, count=10)
        most = max(most, sum(1 for _ in (tmp_path / "cache").rglob("*.npy")))
    assert 16 < most <= 3 * 16  # of 125 chunks


def test_a_chunk_that_somebody_deleted_is_fetched_again(numbered, tmp_path):
    stream = StreamedSplit(numbered(30), "train", window_images=64, cache_dir=tmp_path / "cache")
    whole = numbers(stream.ordered(0, first=0, count=200))
    stream = StreamedSplit(numbered(30), "train", window_images=64, cache_dir=tmp_path / "cache")
    read = numbers(stream.ordered(0, first=0, count=32))
    for file in (tmp_path / "cache").rglob("*.npy"):
        file.unlink()
    assert read + numbers(stream.ordered(0, first=32, count=168)) == whole


def test_a_full_disk_is_an_error_and_leaves_nothing_half_written(small_disk, tmp_path, data_config, rng):
    noise = rng.integers(0, 256, (400, 64, 64, 3), np.uint8)  # a chunk of 3 MB
    splits = {name: Split(400, lambda: (Example(image, 0) for image in noise)) for name in ("train", "test")}
    data = data_config("image_folder", image_size=64, channels=3)
    uri = write_dataset(Source("noise", "none", ("a",), splits), str(tmp_path), name="noise", data=data).uri
    stream = StreamedSplit(uri, "train", window_images=4096, cache_dir=small_disk.folder)
    with pytest.raises(OSError, match=r"No space left|File too large|requested and .* written"):
        stream.ordered(0, first=0, count=1)
    assert not list(small_disk.folder.rglob("*.tmp-*"))


READER = """
import sys
import numpy as np
from ncsn.data.training_images import StreamedSplit

stream = StreamedSplit(sys.argv[1], "train", window_images=64, cache_dir=sys.argv[2])
images = np.concatenate([stream.ordered(3, first=first, count=50) for first in range(0, 1000, 50)])
print((images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 1, 0]).sum(), len(set(images[:500, 0, 1, 0].tolist())))
"""


def test_processes_of_a_node_share_the_chunks(numbered, tmp_path):
    command = [sys.executable, "-c", READER, numbered(30), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert outputs == [[str(2 * sum(range(500))), "256"]] * 2
    assert not list(Path(tmp_path / "cache").rglob("*.tmp-*"))
