"""The node-local copy, and the endless order of training images."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refused import refused

from ncsn import storage
from ncsn.data import training_images
from ncsn.data.parquet import read_split, write_dataset
from ncsn.data.sources import open_source
from ncsn.data.training_images import image_indices, open_cache


@pytest.fixture
def dataset(tmp_path, data_config) -> str:
    config = data_config("sklearn_digits", rows_per_part=500)
    return write_dataset(open_source(config), str(tmp_path / "digits"), name="digits", data=config).uri


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_copy_equals_the_dataset(dataset, tmp_path):
    for split in ("train", "test"):
        copy, rows = open_cache(dataset, split, cache_dir=tmp_path / "cache"), read_split(dataset, split)
        assert type(copy.images) is np.ndarray and isinstance(copy.images.base, np.memmap)
        assert (copy.images.dtype, copy.labels.dtype) == (np.uint8, np.int64)
        assert np.array_equal(copy.images, rows.images)
        assert np.array_equal(copy.labels, rows.labels)
        assert len(copy) == len(rows)


def test_the_copy_cannot_be_written(dataset, tmp_path):
    copy = open_cache(dataset, "train", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="read-only"):
        copy.images[0] = 0


def test_the_copy_is_made_once_from_a_bucket(s3_root, tmp_path, data_config, monkeypatch):
    config = data_config("sklearn_digits", max_images=50)
    uri = write_dataset(open_source(config), f"{s3_root}/digits", name="digits", data=config).uri
    first = open_cache(uri, "train", cache_dir=tmp_path)
    for name in ("train", "test"):
        storage.delete_file(f"{uri}/{name}/part-00000.parquet")
    assert np.array_equal(open_cache(uri, "train", cache_dir=tmp_path).images, first.images)


def test_of_workers_that_ask_at_once_one_makes_the_copy(dataset, tmp_path, monkeypatch):
    made = []
    fill = training_images._fill
    monkeypatch.setattr(
        training_images, "_fill", lambda *arguments: (made.append(threading.get_ident()), fill(*arguments))
    )
    barrier = threading.Barrier(6)

    def ask(_: int) -> int:
        barrier.wait()
        return int(open_cache(dataset, "train", cache_dir=tmp_path / "cache").images.sum())

    with ThreadPoolExecutor(6) as pool:
        sums = set(pool.map(ask, range(6)))
    assert len(made) == 1
    assert sums == {int(read_split(dataset, "train").images.sum())}


def test_the_environment_names_the_folder(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("NCSN_CACHE_DIR", str(tmp_path / "from-environment"))
    open_cache(dataset, "test")
    assert [name for name in files_below(tmp_path / "from-environment") if name.endswith(".npy")] == [
        f"{Path(dataset).name}/test/images.npy",
        f"{Path(dataset).name}/test/labels.npy",
    ]


def test_a_dataset_of_other_content_is_noticed_and_not_kept(dataset, tmp_path):
    part = Path(dataset) / "train" / "part-00001.parquet"
    part.write_bytes((Path(dataset) / "train" / "part-00000.parquet").read_bytes())  # whole, but the wrong rows
    with refused(dataset):
        open_cache(dataset, "train", cache_dir=tmp_path / "cache")
    assert [name for name in files_below(tmp_path / "cache") if not name.endswith(".lock")] == []


def test_a_damaged_copy_is_named(dataset, tmp_path):
    open_cache(dataset, "train", cache_dir=tmp_path / "cache")
    path = next((tmp_path / "cache").rglob("images.npy"))
    path.write_bytes(path.read_bytes()[:1000])
    with refused(str(path.parent)):
        open_cache(dataset, "train", cache_dir=tmp_path / "cache")


def test_a_full_disk_is_an_error_and_leaves_nothing(small_disk, tmp_path, data_config):
    config = data_config("sklearn_digits", image_size=64, rows_per_part=100)
    uri = write_dataset(open_source(config), str(tmp_path / "digits"), name="digits", data=config).uri
    with pytest.raises(OSError, match=r"No space left|File too large") as failure:
        open_cache(uri, "train", cache_dir=small_disk.folder)
    assert failure.value.errno == small_disk.full
    assert [name for name in files_below(small_disk.folder) if not name.endswith(".lock")] == []


def test_each_epoch_visits_every_image_once_in_an_order_of_its_own():
    epochs = image_indices(7, first=0, count=300, size=100).reshape(3, 100)
    assert all(np.array_equal(np.sort(epoch), np.arange(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert not np.array_equal(epochs[0], np.arange(100))


def test_the_seed_decides_the_order():
    assert np.array_equal(image_indices(1, first=0, count=50, size=50), image_indices(1, first=0, count=50, size=50))
    assert not np.array_equal(
        image_indices(1, first=0, count=50, size=50), image_indices(2, first=0, count=50, size=50)
    )


@given(size=st.integers(1, 40), cuts=st.lists(st.integers(0, 30), min_size=1, max_size=8), start=st.integers(0, 1000))
def test_the_order_does_not_depend_on_the_batches(size, cuts, start):
    whole = image_indices(3, first=start, count=sum(cuts), size=size)
    firsts = start + np.cumsum([0, *cuts[:-1]])
    pieces = [
        image_indices(3, first=int(first), count=count, size=size) for first, count in zip(firsts, cuts, strict=True)
    ]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert whole.dtype == np.int64


def test_a_batch_larger_than_the_dataset_wraps_around():
    assert np.bincount(image_indices(0, first=0, count=25, size=10), minlength=10).min() >= 2


@pytest.mark.parametrize("arguments", [{"first": -1}, {"count": -1}, {"size": 0}])
def test_impossible_positions_are_refused(arguments):
    with pytest.raises(ValueError, match="first"):
        image_indices(0, **{"first": 0, "count": 1, "size": 1, **arguments})
