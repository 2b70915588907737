"""MNIST and Fashion-MNIST from IDX files that the tests make."""

from __future__ import annotations

import gzip
import struct
import urllib.request

import numpy as np
import pytest
from refused import refused

from ncsn.data.sources import open_source
from ncsn.errors import NotFound

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def read(source, split):
    examples = list(source.splits[split].stream())
    return np.stack([example.image for example in examples]), np.array([example.label for example in examples])


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("folder", ["x", "x/raw", "x/FashionMNIST/raw"])
def test_images_and_labels_come_in_order(idx_folder, data_config, tmp_path, folder, compress):
    _, arrays = idx_folder(folder=folder, compress=compress)
    source = open_source(data_config("fashion_mnist", tmp_path / "x"))
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = read(source, split)
        assert np.array_equal(images[..., 0], arrays[f"{prefix}-images-idx3-ubyte"])
        assert np.array_equal(labels, arrays[f"{prefix}-labels-idx1-ubyte"])
        assert source.splits[split].count == len(labels)
    assert len(source.class_names) == 10


def test_mnist_has_its_own_torchvision_folder_and_names(idx_folder, data_config, tmp_path):
    idx_folder(folder="x/MNIST/raw")
    assert open_source(data_config("mnist", tmp_path / "x")).class_names == tuple("0123456789")
    with refused("data.root", error=NotFound):
        open_source(data_config("fashion_mnist", tmp_path / "x"))


def test_names_with_a_dot_are_found(idx_folder, data_config):
    folder, _ = idx_folder()
    for path in folder.iterdir():
        path.rename(folder / path.name.replace("-idx", ".idx"))
    assert open_source(data_config("mnist", folder)).splits["train"].count == 12


def test_a_split_can_be_read_twice(idx_folder, data_config):
    folder, _ = idx_folder(compress=True)
    source = open_source(data_config("mnist", folder))
    assert np.array_equal(read(source, "train")[0], read(source, "train")[0])


def test_images_larger_than_a_chunk_stream_whole(idx_folder, data_config, monkeypatch):
    folder, arrays = idx_folder(train=12)
    monkeypatch.setattr("ncsn.data.small_sets._CHUNK_BYTES", 5 * 64)  # 5, 5 and 2 images
    assert np.array_equal(read(open_source(data_config("mnist", folder)), "train")[0][..., 0], arrays[TRAIN_IMAGES])


def test_max_images_takes_the_first_of_each_split(idx_folder, data_config):
    folder, arrays = idx_folder()
    source = open_source(data_config("mnist", folder, max_images=7))
    assert np.array_equal(read(source, "train")[0][..., 0], arrays[TRAIN_IMAGES][:7])
    assert [source.splits[split].count for split in ("train", "test")] == [7, 5]


def test_other_sizes_are_resized(idx_folder, data_config):
    folder, _ = idx_folder(side=28)
    assert read(open_source(data_config("mnist", folder, image_size=14)), "train")[0].shape == (12, 14, 14, 1)


def test_gray_is_refused_as_rgb_by_name(idx_folder, data_config):
    folder, _ = idx_folder()
    source = open_source(data_config("mnist", folder, channels=3))
    with refused("data.channels") as caught:
        next(source.splits["train"].stream())
    assert f"image 0 of {folder}/{TRAIN_IMAGES}" in caught.value.problems[0].reason
    converted = open_source(data_config("mnist", folder, channels=3, convert_channels=True))
    assert next(converted.splits["train"].stream()).image.shape == (8, 8, 3)


def test_a_truncated_file_is_refused_when_opened(idx_folder, data_config):
    folder, _ = idx_folder()
    path = folder / TRAIN_IMAGES
    path.write_bytes(path.read_bytes()[:-100])
    with refused(str(path)) as caught:
        open_source(data_config("mnist", folder))
    assert "768" in caught.value.problems[0].reason and "668" in caught.value.problems[0].reason


@pytest.mark.parametrize("lost_pixels", [1, 100, 768])
def test_truncated_content_of_a_whole_gzip_file_is_refused(idx_folder, data_config, lost_pixels):
    folder, _ = idx_folder(compress=True)
    path = folder / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-lost_pixels]))
    source = open_source(data_config("mnist", folder))
    with refused(str(path)) as caught:
        list(source.splits["train"].stream())
    assert f"found {768 - lost_pixels}" in caught.value.problems[0].reason


def test_a_cut_gzip_file_is_refused_with_the_bytes_it_still_gives(idx_folder, data_config):
    folder, _ = idx_folder(compress=True, train=2000)
    path = folder / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:60_000])
    source = open_source(data_config("mnist", folder))
    with refused(str(path)) as caught:
        list(source.splits["train"].stream())
    assert "128000" in caught.value.problems[0].reason


def test_damage_inside_a_gzip_file_is_refused(idx_folder, data_config):
    folder, _ = idx_folder(compress=True, train=2000)
    path = folder / f"{TRAIN_IMAGES}.gz"
    content = bytearray(path.read_bytes())
    content[40_000:40_100] = bytes(100)
    path.write_bytes(content)
    source = open_source(data_config("mnist", folder))
    with refused(str(path)):
        list(source.splits["train"].stream())


def test_more_bytes_than_promised_are_refused(idx_folder, data_config):
    folder, _ = idx_folder()
    path = folder / TRAIN_IMAGES
    path.write_bytes(path.read_bytes() + b"x")
    with refused(str(path)) as caught:
        open_source(data_config("mnist", folder))
    assert "769" in caught.value.problems[0].reason
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    with refused(f"{path}.gz"):
        list(open_source(data_config("mnist", folder)).splits["train"].stream())


@pytest.mark.parametrize("length", [0, 1, 15])
def test_a_file_without_a_whole_header_is_refused(idx_folder, data_config, length):
    folder, _ = idx_folder()
    path = folder / TRAIN_IMAGES
    path.write_bytes(path.read_bytes()[:length])
    with refused(str(path)) as caught:
        open_source(data_config("mnist", folder))
    assert f"found {length}" in caught.value.problems[0].reason


def test_the_wrong_magic_number_is_refused(idx_folder, data_config):
    folder, _ = idx_folder()
    (folder / TRAIN_IMAGES).write_bytes((folder / TRAIN_LABELS).read_bytes() + bytes(20))
    with refused(f"{folder}/{TRAIN_IMAGES}") as caught:
        open_source(data_config("mnist", folder))
    assert "0x00000801" in caught.value.problems[0].reason
    (folder / TRAIN_IMAGES).write_bytes(b"<!DOCTYPE html><html>")
    with refused(f"{folder}/{TRAIN_IMAGES}"):
        open_source(data_config("mnist", folder))


def test_absurd_sizes_in_a_header_are_refused(idx_folder, data_config):
    folder, _ = idx_folder(compress=True)
    (folder / f"{TRAIN_IMAGES}.gz").write_bytes(struct.pack(">4I", 0x803, 12, 2**31, 2**31))
    with refused(f"{folder}/{TRAIN_IMAGES}.gz"):
        open_source(data_config("mnist", folder))


def test_images_and_labels_must_be_as_many(idx_folder, data_config, formats):
    folder, arrays = idx_folder()
    (folder / TRAIN_LABELS).write_bytes(formats.idx(arrays[TRAIN_LABELS][:-1]))
    with refused(f"{folder}/{TRAIN_LABELS}"):
        open_source(data_config("mnist", folder))


def test_labels_out_of_range_are_refused(idx_folder, data_config, formats):
    folder, arrays = idx_folder()
    labels = arrays[TRAIN_LABELS].copy()
    labels[4] = 10
    (folder / TRAIN_LABELS).write_bytes(formats.idx(labels))
    with refused(f"{folder}/{TRAIN_LABELS}") as caught:
        list(open_source(data_config("mnist", folder)).splits["train"].stream())
    assert "image 4 label 10" in caught.value.problems[0].reason


def test_a_missing_file_is_named_with_what_to_do(idx_folder, data_config):
    folder, _ = idx_folder()
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with refused("data.root", error=NotFound) as caught:
        open_source(data_config("mnist", folder))
    assert "t10k-labels-idx1-ubyte" in caught.value.problems[0].reason


def test_download_leaves_files_that_are_there_alone(idx_folder, data_config):
    folder, _ = idx_folder()
    before = sorted(path.name for path in folder.rglob("*"))
    assert open_source(data_config("mnist", folder, download=True)).splits["train"].count == 12
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_a_download_without_a_network_is_one_clear_line(data_config, tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port: nothing listens
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    # urllib keeps the proxies that it saw first, so give this test an opener of its own and later ones theirs.
    monkeypatch.setattr(urllib.request, "_opener", None)
    with pytest.raises(ConnectionError, match="MNIST") as failure:
        open_source(data_config("mnist", tmp_path / "new", download=True))
    assert "\n" not in str(failure.value)
