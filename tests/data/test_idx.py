"""MNIST and Fashion-MNIST from IDX files that the tests make."""

from __future__ import annotations

import gzip
import struct
import urllib.request

import numpy as np
import pytest

from ncsn.data.sources import open_source

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
    with pytest.raises(FileNotFoundError, match="has no train-images-idx3-ubyte"):
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
    monkeypatch.setattr("ncsn.data.idx._CHUNK_BYTES", 5 * 64)  # 5, 5 and 2 images
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
    with pytest.raises(ValueError, match=f"image 0 of {folder}/{TRAIN_IMAGES} is gray but data.channels is 3"):
        next(source.splits["train"].stream())
    converted = open_source(data_config("mnist", folder, channels=3, convert_channels=True))
    assert next(converted.splits["train"].stream()).image.shape == (8, 8, 3)


def test_a_truncated_file_is_refused_when_opened(idx_folder, data_config):
    folder, _ = idx_folder()
    path = folder / TRAIN_IMAGES
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{path} is truncated: expected 12 x 8 x 8 = 768 bytes .*, found 668"):
        open_source(data_config("mnist", folder))


@pytest.mark.parametrize("lost_pixels", [1, 100, 768])
def test_truncated_content_of_a_whole_gzip_file_is_refused(idx_folder, data_config, lost_pixels):
    folder, _ = idx_folder(compress=True)
    path = folder / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-lost_pixels]))
    source = open_source(data_config("mnist", folder))
    with pytest.raises(
        ValueError, match=f"is truncated: expected 12 x 8 x 8 = 768 bytes .*, found {768 - lost_pixels};"
    ):
        list(source.splits["train"].stream())


def test_a_cut_gzip_file_is_refused_with_the_bytes_it_still_gives(idx_folder, data_config):
    folder, _ = idx_folder(compress=True, train=2000)
    path = folder / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:60_000])
    source = open_source(data_config("mnist", folder))
    with pytest.raises(ValueError, match=r"is truncated: expected 2000 x 8 x 8 = 128000 bytes .*, found 5\d{4};"):
        list(source.splits["train"].stream())


def test_damage_inside_a_gzip_file_is_refused(idx_folder, data_config):
    folder, _ = idx_folder(compress=True, train=2000)
    path = folder / f"{TRAIN_IMAGES}.gz"
    content = bytearray(path.read_bytes())
    content[40_000:40_100] = bytes(100)
    path.write_bytes(content)
    source = open_source(data_config("mnist", folder))
    with pytest.raises(ValueError, match=rf"{path} is a damaged gzip file"):
        list(source.splits["train"].stream())


def test_more_bytes_than_promised_are_refused(idx_folder, data_config):
    folder, _ = idx_folder()
    path = folder / TRAIN_IMAGES
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"is too long: expected .* found 769"):
        open_source(data_config("mnist", folder))
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    with pytest.raises(ValueError, match="more bytes than its header says"):
        list(open_source(data_config("mnist", folder)).splits["train"].stream())


@pytest.mark.parametrize("length", [0, 1, 15])
def test_a_file_without_a_whole_header_is_refused(idx_folder, data_config, length):
    folder, _ = idx_folder()
    path = folder / TRAIN_IMAGES
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"{path} is truncated: expected a header of 16 bytes, found {length}"):
        open_source(data_config("mnist", folder))


def test_the_wrong_magic_number_is_refused(idx_folder, data_config):
    folder, _ = idx_folder()
    (folder / TRAIN_IMAGES).write_bytes((folder / TRAIN_LABELS).read_bytes() + bytes(20))
    with pytest.raises(ValueError, match="starts with magic number 0x00000801, but IDX images start with 0x00000803"):
        open_source(data_config("mnist", folder))
    (folder / TRAIN_IMAGES).write_bytes(b"<!DOCTYPE html><html>")
    with pytest.raises(ValueError, match="magic number 0x3c21444f"):
        open_source(data_config("mnist", folder))


def test_absurd_sizes_in_a_header_are_refused(idx_folder, data_config):
    folder, _ = idx_folder(compress=True)
    (folder / f"{TRAIN_IMAGES}.gz").write_bytes(struct.pack(">4I", 0x803, 12, 2**31, 2**31))
    with pytest.raises(ValueError, match="2147483648x2147483648 pixels; it is damaged"):
        open_source(data_config("mnist", folder))


def test_images_and_labels_must_be_as_many(idx_folder, data_config, formats):
    folder, arrays = idx_folder()
    (folder / TRAIN_LABELS).write_bytes(formats.idx(arrays[TRAIN_LABELS][:-1]))
    with pytest.raises(ValueError, match=r"holds 12 images but .* holds 11 labels"):
        open_source(data_config("mnist", folder))


def test_labels_out_of_range_are_refused(idx_folder, data_config, formats):
    folder, arrays = idx_folder()
    labels = arrays[TRAIN_LABELS].copy()
    labels[4] = 10
    (folder / TRAIN_LABELS).write_bytes(formats.idx(labels))
    with pytest.raises(ValueError, match="gives image 4 label 10; labels are 0 to 9"):
        list(open_source(data_config("mnist", folder)).splits["train"].stream())


def test_a_missing_file_is_named_with_what_to_do(idx_folder, data_config):
    folder, _ = idx_folder()
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no t10k-labels-idx1-ubyte \(or \.gz\).*data\.download to true"):
        open_source(data_config("mnist", folder))


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
    with pytest.raises(ConnectionError, match=r"could not download MNIST into .* by hand") as failure:
        open_source(data_config("mnist", tmp_path / "new", download=True))
    assert "\n" not in str(failure.value)
