"""The endless order of training images: from a copy of all on the node, and from windows of them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from image_folders import GeneratedSplit, files_below
from refused import refused

from ncsn import storage
from ncsn.data import training_images
from ncsn.data.dataset import write_dataset
from ncsn.data.format import load_manifest, read_split
from ncsn.data.pixels import Example
from ncsn.data.sources import open_source
from ncsn.data.sources.base import Source
from ncsn.data.streamed import StreamedSplit, window_at
from ncsn.data.training_images import CachedSplit, open_cache, open_training_images
from ncsn.errors import NotFound


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NCSN_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def dataset(tmp_path, data_config, monkeypatch) -> str:
    monkeypatch.setattr("ncsn.data.format.PART_IMAGES", 500)
    config = data_config("sklearn_digits")
    return write_dataset(open_source(config), str(tmp_path / "digits"), name="digits", data=config).uri


def test_the_copy_of_a_dataset_in_a_bucket_equals_it_and_is_made_once(s3_root, data_config, monkeypatch):
    monkeypatch.setattr("ncsn.data.format.PART_IMAGES", 20)
    config = data_config("sklearn_digits", max_images=50)
    uri = write_dataset(open_source(config), f"{s3_root}/digits", name="digits", data=config).uri
    for split in ("train", "test"):
        rows, made = read_split(uri, split), open_cache(uri, split)
        storage.delete(f"{uri}/{split}/part-00000.parquet")
        for copy in (made, open_cache(uri, split)):
            assert isinstance(copy.images.base, np.memmap) and not copy.images.flags.writeable
            assert (copy.images.dtype, copy.labels.dtype) == (np.uint8, np.int64)
            assert np.array_equal(copy.images, rows.images) and np.array_equal(copy.labels, rows.labels)


def test_of_workers_that_ask_at_once_one_makes_the_copy(dataset, monkeypatch):
    made, fill, barrier = [], training_images._copy, threading.Barrier(6)
    monkeypatch.setattr(training_images, "_copy", lambda *given, **named: made.append(fill(*given, **named)))

    def ask(_: int) -> int:
        barrier.wait()
        return int(open_cache(dataset, "train").images.sum())

    with ThreadPoolExecutor(6) as pool:
        sums = set(pool.map(ask, range(6)))
    assert len(made) == 1 and sums == {int(read_split(dataset, "train").images.sum())}


def test_a_dataset_of_other_content_and_a_damaged_copy_are_named(dataset, tmp_path):
    part = Path(dataset) / "train" / "part-00001.parquet"
    part.write_bytes((Path(dataset) / "train" / "part-00000.parquet").read_bytes())  # whole, but the wrong rows
    for _ in range(2):  # it is made again
        with refused(str(part)):
            open_cache(dataset, "train")
    stream = StreamedSplit(dataset, "train", window_images=500)
    with refused(str(part)):
        stream.ordered(0, first=0, count=1348)
    shutil.rmtree(tmp_path / "cache" / Path(dataset).name / "train-parts")
    assert [name for name in files_below(tmp_path / "cache") if not name.endswith(".lock")] == []
    open_cache(dataset, "test")
    copy = next((tmp_path / "cache").rglob("images.npy"))
    copy.write_bytes(copy.read_bytes()[:1000])  # damaged
    with refused(str(copy.parent)):
        open_cache(dataset, "test")


def test_a_full_disk_is_an_error_and_leaves_nothing(small_disk, tmp_path, data_config, monkeypatch):
    monkeypatch.setenv("NCSN_CACHE_DIR", str(small_disk.folder))
    monkeypatch.setattr("ncsn.data.format.PART_IMAGES", 100)
    config = data_config("sklearn_digits", image_size=64)
    uri = write_dataset(open_source(config), str(tmp_path / "digits"), name="digits", data=config).uri
    with pytest.raises(OSError, match=r"No space left|File too large") as failure:
        open_cache(uri, "train")
    assert failure.value.errno == small_disk.full
    assert [name for name in files_below(small_disk.folder) if not name.endswith(".lock")] == []


def test_the_order_of_one_window_stays_what_it_was():
    """Over the end of an epoch: checkpoints go on where they were."""
    split = CachedSplit(np.empty(100), np.empty(100))
    assert split.order(3, first=95, count=10).tolist() == [11, 52, 35, 16, 37, 86, 36, 71, 8, 6]


@pytest.mark.parametrize("lengths", [[10] * 100 + [7], [9, 10, 1, 10], [33]])
@pytest.mark.parametrize("parts", [1, 4, 200])
def test_each_epoch_of_windows_has_every_image_once(lengths, parts):
    orders, size, edges = [], sum(lengths), np.cumsum([0, *lengths])
    for epoch in range(3):
        rows, place = [], epoch * size
        while place < (epoch + 1) * size:
            found = window_at(5, place, lengths=np.array(lengths), parts=parts)
            inside = window_at(5, found.last - 1, lengths=np.array(lengths), parts=parts)
            assert found.first == inside.first == place and np.array_equal(inside.rows, found.rows)
            assert len(found.parts) <= parts
            assert sorted(found.rows) == [row for part in sorted(found.parts) for row in range(*edges[part : part + 2])]
            rows += found.rows.tolist()
            place = found.last
        assert place == (epoch + 1) * size and sorted(rows) == list(range(size))
        orders.append(tuple(rows))
    assert len(set(orders)) == 3
    assert window_at(6, 0, lengths=np.array(lengths), parts=parts).rows.tolist() != list(orders[0])


def test_a_window_of_a_sorted_split_is_a_mix_of_its_classes():
    """100 classes in a row, 64 of 1,000 parts to a window: 64 random places of the order."""
    window = window_at(0, 5000, lengths=np.full(1000, 16), parts=64)
    classes = window.rows // 160
    assert len({*classes}) > 35 and np.bincount(classes).max() < 100
    assert len({*classes[:128]}) > 30  # of a batch


LENGTHS = np.array([30] * 16 + [20])


@pytest.fixture
def numbered(tmp_path, data_config, monkeypatch) -> str:
    """A dataset of 500 and 20 images whose first two pixels are their number, 30 to a part."""

    def rows(numbers: range) -> Iterator[Example]:
        for number in numbers:
            image = np.full((8, 8, 1), 7, np.uint8)
            image[0, :2, 0] = divmod(number, 256)
            yield Example(image, number % 10)

    given = {"train": range(500), "test": range(500, 520)}
    splits = {split: GeneratedSplit(len(some), partial(rows, some)) for split, some in given.items()}
    source, data = Source("numbers", "none", tuple("0123456789"), splits), data_config("image_folder")
    monkeypatch.setattr("ncsn.data.format.PART_IMAGES", 30)
    return write_dataset(source, str(tmp_path / "store"), name="numbers", data=data).uri


def numbers(images: np.ndarray) -> list[int]:
    return (images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 1, 0]).tolist()


def test_workers_and_resumes_change_nothing(numbered, tmp_path, monkeypatch):
    def open_stream(name: str) -> StreamedSplit:
        monkeypatch.setenv("NCSN_CACHE_DIR", str(tmp_path / name))
        return StreamedSplit(numbered, "train", window_images=64)

    places = [window_at(3, place, lengths=LENGTHS, parts=2) for place in range(1200)]
    expected = [int(window.rows[place - window.first]) for place, window in enumerate(places)]
    alone = open_stream("a")
    read = [alone.ordered(3, first=first, count=40) for first in range(0, 1200, 40)]
    assert numbers(np.concatenate([rows.images for rows in read])) == expected
    assert np.concatenate([rows.labels for rows in read]).tolist() == [number % 10 for number in expected]
    assert alone.order(3, first=777, count=400).tolist() == expected[777:1177]
    pair = [open_stream("shared"), open_stream("shared")]  # two workers of one node, half a batch each
    shared = [
        worker.ordered(3, first=first + 20 * rank, count=20).images
        for first in range(0, 1200, 40)
        for rank, worker in enumerate(pair)
    ]
    assert numbers(np.concatenate(shared)) == expected
    assert numbers(open_stream("resumed").ordered(3, first=777, count=100).images) == expected[777:877]


def test_the_first_window_is_enough_to_begin_and_a_later_error_is_that_of_a_batch(numbered, tmp_path):
    parts = load_manifest(numbered).parts["train"]
    first, second = (window_at(0, place, lengths=LENGTHS, parts=2) for place in (0, 60))
    for number in {*range(len(parts))} - {*first.parts}:
        Path(numbered, parts[number].path).unlink()
    stream = StreamedSplit(numbered, "train", window_images=64)
    assert numbers(stream.ordered(0, first=0, count=10).images) == first.rows[:10].tolist()
    assert isinstance(stream._ahead.exception(), NotFound)
    with refused(f"{numbered}/{parts[second.parts[0]].path}", error=NotFound):
        stream.ordered(0, first=10, count=10)


def test_only_windows_are_on_the_disk_if_there_is_no_room_for_all(numbered, tmp_path, monkeypatch):
    def disk_with(free: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _folder: SimpleNamespace(free=free))

    disk_with(2 * 60 * (8 * 8 + 8) - 1)
    with refused(str(tmp_path / "cache" / Path(numbered).name / "train-parts")):
        StreamedSplit(numbered, "train", window_images=64)
    disk_with(2 * 60 * (8 * 8 + 8))
    stream = StreamedSplit(numbered, "train", window_images=64)
    most = 0
    for first in range(0, 1000, 10):
        stream.ordered(0, first=first, count=10)
        assert stream._ahead.exception() is None  # the next window is there
        most = max(most, sum(1 for _ in (tmp_path / "cache").rglob("*.npy")))
    assert 2 < most <= 3 * 2  # of 17 parts
    disk_with(1 << 40)
    stream = StreamedSplit(numbered, "train", window_images=64)
    for first in range(0, 500, 10):
        stream.ordered(0, first=first, count=10)
    assert sum(1 for _ in (tmp_path / "cache").rglob("*.npy")) == 17


def test_a_split_says_while_its_next_window_is_on_its_way(numbered, monkeypatch):
    split, arrived = StreamedSplit(numbered, "train", window_images=64), threading.Event()
    prepare = split._prepare

    def prepare_late(seed, place):
        if place > 0:
            arrived.wait(20)
        return prepare(seed, place)

    monkeypatch.setattr(split, "_prepare", prepare_late)
    split.ordered(0, first=0, count=1)
    assert split.fetching
    arrived.set()
    split._thread.shutdown()
    assert not split.fetching


def test_the_size_of_the_split_decides_how_it_is_read(numbered, monkeypatch):
    for name, most in (("WINDOW_BYTES", 500 * 64), ("WINDOW_IMAGES", 500)):
        monkeypatch.setattr(training_images, name, most)
        assert isinstance(open_training_images(numbered), CachedSplit)
        with monkeypatch.context() as patch:
            patch.setattr(training_images, name, most - 1)
            assert isinstance(open_training_images(numbered), StreamedSplit)
    assert isinstance(open_training_images(numbered, "test"), CachedSplit)
