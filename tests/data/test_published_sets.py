"""The sets that libraries hold or read: scikit-learn's, and MNIST, Fashion-MNIST and CIFAR-10 from written files."""

from __future__ import annotations

import hashlib
import pickle
import struct
import urllib.request

import numpy as np
import pytest
from image_folders import Formats, put
from refused import refused
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

from ncsn.data.sources import open_source
from ncsn.errors import NotFound

PHOTOS = {"image_size": 32, "channels": 3, "test_fraction": 0.2}
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
CIFAR = {"image_size": 32, "channels": 3}


def read(source, split):
    examples = list(source.splits[split].stream())
    assert len(examples) == len(source.splits[split])
    return np.stack([example.image for example in examples]), np.array([example.label for example in examples])


def test_every_digit_is_in_one_split_with_its_ink_to_the_gray_step(data_config):
    original = load_digits()
    source = open_source(data_config("sklearn_digits", test_fraction=0.3))
    (train, train_labels), (test, test_labels) = (read(source, split) for split in ("train", "test"))
    images, labels = np.concatenate([train, test]), np.concatenate([train_labels, test_labels])
    ink = [tuple(image.ravel()) for image in np.rint(images.astype(float) * 16 / 255).astype(int)]
    expected = [tuple(image.ravel()) for image in original.images.astype(int)]
    assert sorted(zip(ink, labels.tolist(), strict=True)) == sorted(
        zip(expected, original.target.tolist(), strict=True)
    )
    assert set(np.unique(images)) == {(255 * ink * 2 + 16) // 32 for ink in range(17)}
    assert (len(train), len(test)) == (1258, 539)
    assert np.abs(np.bincount(test_labels) / np.bincount(original.target) - 0.3).max() < 0.01
    assert read(open_source(data_config("sklearn_digits", image_size=16)), "test")[0].shape[1:] == (16, 16, 1)


@pytest.fixture
def photographs(monkeypatch):
    """In place of scikit-learn's two: the pixels of each say where they are, see `patches_of`."""
    rows, columns = np.indices((427, 640))
    found = [np.stack([rows % 256, columns % 256, rows // 256 + 2 * (columns // 256) + 8 * n], 2) for n in (0, 1)]
    named = dict(zip(("china.jpg", "flower.jpg"), (each.astype(np.uint8) for each in found), strict=True))
    monkeypatch.setattr("sklearn.datasets.load_sample_image", named.__getitem__)


def patches_of(split):
    """Photograph, side, top and left of each patch."""
    corners = np.array([image[0, 0] for image in split.images], int)
    tops, lefts = corners[:, 0] + 256 * (corners[:, 2] % 2), corners[:, 1] + 256 * (corners[:, 2] // 2 % 4)
    sides = [len(image) for image in split.images]
    return list(zip((corners[:, 2] // 8).tolist(), sides, tops.tolist(), lefts.tolist(), strict=True))


@pytest.mark.usefixtures("photographs")
def test_patches_for_training_and_for_testing_share_no_pixel(data_config):
    """The strip has 0.2 * 640 = 128 columns, and starts at 0.5 and at 0.2 of the other 512."""
    source = open_source(data_config("sklearn_photos", **PHOTOS))
    assert source.class_names == ("china", "flower")
    strips = [slice(256, 384), slice(102, 230)]
    for split, per_side in (("train", [5750, 4554, 2660]), ("test", [1300, 828, 76])):
        patches = patches_of(source.splits[split])
        read = source.splits[split].section(0, 200).stream()
        assert [row.label for row in read] == [photograph for photograph, *_ in patches[:200]]
        assert len(set(patches)) == len(patches) == len(source.splits[split])
        assert [sum(each[1] == side for each in patches) for side in (32, 64, 128)] == per_side
        covered = np.zeros((2, 427, 640), bool)
        for number, side, top, left in patches:
            assert 0 <= top <= 427 - side and 0 <= left <= 640 - side
            covered[number, top : top + side, left : left + side] = True
        for photograph, strip in zip(covered, strips, strict=True):
            inside = photograph[:, strip].copy()
            photograph[:, strip] = False
            assert (inside if split == "test" else photograph).mean() > 0.75
            assert not (photograph if split == "test" else inside).any()


def test_patches_are_mixed_and_fit_the_photographs(data_config):
    images, labels = read(open_source(data_config("sklearn_photos", max_images=400, **PHOTOS)), "test")
    assert images.shape == (400, 32, 32, 3) and 0.4 < labels.mean() < 0.6
    for fraction, largest in ((0.2, 128), (0.01, 6), (0.9, 32)):
        settings = PHOTOS | {"image_size": max(8, largest + 1), "test_fraction": fraction}
        with refused("data.image_size") as caught:
            open_source(data_config("sklearn_photos", **settings))
        assert f"{largest} pixels" in caught.value.problems[0].reason


@pytest.mark.parametrize(
    ("source", "folder", "compress"),
    [("mnist", "x", False), ("mnist", "x/raw", True), ("fashion_mnist", "x/FashionMNIST/raw", True)],
)
def test_idx_images_and_labels_come_in_order(idx_folder, data_config, tmp_path, source, folder, compress):
    _, arrays = idx_folder(folder=folder, compress=compress)
    opened = open_source(data_config(source, tmp_path / "x"))
    for split, prefix in (("train", "train"), ("test", "t10k")):
        for _ in range(2):  # a split can be read again
            images, labels = read(opened, split)
            assert np.array_equal(images[..., 0], arrays[f"{prefix}-images-idx3-ubyte"])
            assert np.array_equal(labels, arrays[f"{prefix}-labels-idx1-ubyte"])
    assert len(opened.class_names) == 10


def test_idx_files_that_are_damaged_or_do_not_fit_each_other_are_refused(idx_folder, data_config):
    folder, arrays = idx_folder()
    images, labels = Formats.idx(arrays[TRAIN_IMAGES]), arrays[TRAIN_LABELS].copy()
    labels[4] = 10
    no_sizes, of_labels = struct.pack(">4I", 0x803, 12, 0, 0), struct.pack(">2I", 0x801, 12) + images[16:]
    wrong = [(TRAIN_IMAGES, content) for content in (images[:-1], of_labels, b"<!DOCTYPE html><html>", no_sizes)]
    wrong += [(TRAIN_LABELS, Formats.idx(some)) for some in (arrays[TRAIN_LABELS][:-1], labels)]
    for name, content in wrong:
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        with refused(str(folder)):
            open_source(data_config("mnist", folder))
        (folder / name).write_bytes(before)
    (folder / TRAIN_LABELS).unlink()
    with refused("data.root", error=NotFound) as caught:
        open_source(data_config("mnist", folder))
    assert TRAIN_LABELS in caught.value.problems[0].reason
    packed, _ = idx_folder(folder="packed", compress=True)
    path = packed / f"{TRAIN_IMAGES}.gz"
    whole = path.read_bytes()
    for content in (whole[:600], whole[:400] + bytes(100) + whole[500:]):
        path.write_bytes(content)
        with refused(str(path)):
            open_source(data_config("mnist", packed))


def test_a_download_without_a_network_is_one_clear_line(data_config, tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port: nothing listens
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    # urllib keeps the proxies that it saw first, so this test has its own opener and later ones theirs.
    monkeypatch.setattr(urllib.request, "_opener", None)
    with pytest.raises(ConnectionError) as failure:
        open_source(data_config("mnist", tmp_path / "new", download=True))
    assert "\n" not in str(failure.value)


@pytest.fixture
def cifar(tmp_path, rng, monkeypatch) -> tuple[np.ndarray, np.ndarray]:
    """Writes CIFAR-10 as a folder and as an archive whose digests torchvision expects; its images and labels."""

    def md5(content: bytes) -> str:
        return hashlib.md5(content, usedforsecurity=False).hexdigest()

    planes, labels = rng.integers(0, 256, (6, 3, 3072), np.uint8), rng.integers(0, 10, (6, 3))
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    pairs = zip(labels.tolist(), planes, strict=True)
    batches = [pickle.dumps({"labels": some, "data": images}) for some, images in pairs]
    meta = pickle.dumps({"label_names": ["airplane", *(f"class {n}" for n in range(1, 10))]})
    files = dict(zip([*names, "batches.meta"], [*batches, meta], strict=True))
    archive = Formats.tar({f"cifar-10-batches-py/{name}": content for name, content in files.items()}, "w:gz")
    digests = [[name, md5(files[name])] for name in names]
    for name, value in {"train_list": digests[:5], "test_list": digests[5:], "tgz_md5": md5(archive)}.items():
        monkeypatch.setattr(CIFAR10, name, value)
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(meta)})
    put(tmp_path / "unpacked" / "cifar-10-batches-py", files)
    put(tmp_path / "packed", {"cifar-10-python.tar.gz": archive})
    return planes.reshape(6, 3, 3, 32, 32).transpose(0, 1, 3, 4, 2), labels


@pytest.mark.parametrize(
    "place", ["unpacked", "unpacked/cifar-10-batches-py", "packed", "packed/cifar-10-python.tar.gz"]
)
def test_every_shape_of_cifar_gives_the_same_images(cifar, tmp_path, data_config, place):
    images, labels = cifar
    source = open_source(data_config("cifar10", tmp_path / place, **CIFAR))
    for split, batches in (("train", slice(5)), ("test", slice(5, 6))):
        found, classes = read(source, split)
        assert np.array_equal(found, np.concatenate(images[batches]))
        assert np.array_equal(classes, np.concatenate(labels[batches]))
    assert source.class_names[0] == "airplane"


@pytest.mark.usefixtures("cifar")
def test_nothing_but_the_published_files_is_unpickled(tmp_path, data_config):
    folder, archive = tmp_path / "unpacked" / "cifar-10-batches-py", tmp_path / "packed" / "cifar-10-python.tar.gz"
    batch = folder / "data_batch_2"
    for damage in (lambda: batch.write_bytes(batch.read_bytes()[:-1]), batch.unlink):
        damage()
        with refused(str(folder)):
            open_source(data_config("cifar10", folder, **CIFAR))
    for content in (archive.read_bytes()[:-20], Formats.tar({"../../data_batch_1": b"x"}, "w:gz"), b"<html>"):
        archive.write_bytes(content)
        with refused(str(archive)):
            open_source(data_config("cifar10", archive, **CIFAR))
    with refused("data.root", error=NotFound):
        open_source(data_config("cifar10", tmp_path / "nothing", **CIFAR))
