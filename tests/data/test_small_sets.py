"""Digits, photographs, MNIST, Fashion-MNIST and CIFAR-10 from files that the tests write, and pickles that attack."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import sys
import urllib.request

import numpy as np
import pytest
from refused import refused
from sklearn.datasets import load_digits, load_sample_image

from ncsn.data.sources.cifar10 import parse_binary, parse_pickle
from ncsn.data.sources.known import open_source
from ncsn.errors import NotFound

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
CIFAR = {"image_size": 32, "channels": 3}
PHOTOS = {"image_size": 32, "channels": 3, "test_fraction": 0.2}


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


def test_patches_are_the_pixels_of_the_photographs(data_config):
    photographs = [load_sample_image(f"{name}.jpg") for name in ("china", "flower")]
    source = open_source(data_config("sklearn_photos", **PHOTOS))
    assert source.class_names == ("china", "flower")
    for split, count in (("train", 300), ("test", 120)):
        first = source.splits[split].section(0, count)
        assert {patch.side for patch in first.patches} == {32, 64, 128}  # shuffled
        assert {patch.photograph for patch in first.patches} == {0, 1}
        for patch, (image, label, _) in zip(first.patches, first.stream(), strict=True):
            rows, columns = (slice(start, start + patch.side) for start in (patch.top, patch.left))
            pixels = photographs[label][rows, columns]
            assert (label, image.shape, image.dtype) == (patch.photograph, (32, 32, 3), np.uint8)
            assert np.abs(image.mean((0, 1)) - pixels.mean((0, 1))).max() < (1e-9 if patch.side == 32 else 1)
            assert patch.side != 32 or np.array_equal(image, pixels)


def test_patches_for_training_and_for_testing_share_no_pixel(data_config):
    """The strip has 0.2 * 640 = 128 columns, and starts at 0.5 and at 0.2 of the other 512."""
    source = open_source(data_config("sklearn_photos", **PHOTOS))
    strips = [slice(256, 384), slice(102, 230)]
    for split, per_side in (("train", [5750, 4554, 2660]), ("test", [1300, 828, 76])):
        patches = source.splits[split].patches
        assert len(set(patches)) == len(patches) == len(source.splits[split])
        assert [sum(patch.side == side for patch in patches) for side in (32, 64, 128)] == per_side
        covered = np.zeros((2, 427, 640), bool)
        for number, side, top, left in patches:
            assert 0 <= top <= 427 - side and 0 <= left <= 640 - side
            covered[number, top : top + side, left : left + side] = True
        for photograph, strip in zip(covered, strips, strict=True):
            inside = photograph[:, strip].copy()
            photograph[:, strip] = False
            assert (inside if split == "test" else photograph).mean() > 0.75
            assert not (photograph if split == "test" else inside).any()


def test_patches_are_the_same_each_time_and_fit_the_photographs(data_config):
    source, again = (open_source(data_config("sklearn_photos", max_images=400, **PHOTOS)) for _ in range(2))
    images, labels = read(source, "test")
    for found, expected in zip(read(again, "test"), (images, labels), strict=True):
        assert np.array_equal(found, expected)
    assert 0.4 < labels.mean() < 0.6
    large = open_source(data_config("sklearn_photos", **PHOTOS | {"image_size": 65}))
    assert {patch.side for split in large.splits.values() for patch in split.patches} == {65}
    for fraction, largest in ((0.2, 128), (0.01, 6), (0.9, 32)):
        settings = PHOTOS | {"image_size": max(8, largest + 1), "test_fraction": fraction}
        with refused("data.image_size") as caught:
            open_source(data_config("sklearn_photos", **settings))
        assert f"{largest} pixels" in caught.value.problems[0].reason
    gray = open_source(data_config("sklearn_photos", image_size=32, max_images=2))
    assert read(gray, "test")[0].shape == (2, 32, 32, 1)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    ("source", "folder"), [("mnist", "x"), ("mnist", "x/raw"), ("fashion_mnist", "x/FashionMNIST/raw")]
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


def test_each_idx_set_has_its_torchvision_folder(idx_folder, data_config, tmp_path):
    idx_folder(folder="x/MNIST/raw")
    assert open_source(data_config("mnist", tmp_path / "x")).class_names == tuple("0123456789")
    with refused("data.root", error=NotFound):
        open_source(data_config("fashion_mnist", tmp_path / "x"))


def test_idx_names_with_a_dot_are_found(idx_folder, data_config):
    folder, _ = idx_folder()
    for path in folder.iterdir():
        path.rename(folder / path.name.replace("-idx", ".idx"))
    assert len(open_source(data_config("mnist", folder)).splits["train"]) == 12


def test_images_are_limited_resized_and_converted(idx_folder, data_config):
    folder, arrays = idx_folder()
    few = open_source(data_config("mnist", folder, max_images=7))
    assert np.array_equal(read(few, "train")[0][..., 0], arrays[TRAIN_IMAGES][:7])
    assert [len(few.splits[split]) for split in ("train", "test")] == [7, 5]
    assert read(open_source(data_config("mnist", folder, image_size=14)), "train")[0].shape == (12, 14, 14, 1)
    converted = open_source(data_config("mnist", folder, channels=3))
    assert next(converted.splits["train"].stream()).image.shape == (8, 8, 3)


IDX_DAMAGE = {  # how the 16 + 768 bytes of the train images change, and words or numbers in the reason
    "truncated": (lambda content: content[:-100], ("768", "found 668")),
    "one pixel short": (lambda content: content[:-1], ("768", "found 767")),
    "no pixels": (lambda content: content[:16], ("768", "found 0")),
    "too long": (lambda content: content + b"x", ("768", "found 769")),
    "empty": (lambda _: b"", ("found 0",)),
    "cut header": (lambda content: content[:15], ("found 15",)),
    "labels": (lambda content: struct.pack(">2I", 0x801, 12) + content[16:], ("0x00000801",)),
    "a web page": (lambda _: b"<!DOCTYPE html><html>", ()),
    "absurd sizes": (lambda content: struct.pack(">4I", 0x803, 12, 2**31, 2**31) + content[16:], ("found 768",)),
    "no sizes": (lambda _: struct.pack(">4I", 0x803, 12, 0, 0), ("found 0",)),
}


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("damage", IDX_DAMAGE)
def test_damaged_idx_files_are_refused(idx_folder, data_config, compress, damage):
    folder, _ = idx_folder(compress=compress)
    path = folder / (f"{TRAIN_IMAGES}.gz" if compress else TRAIN_IMAGES)
    change, told = IDX_DAMAGE[damage]
    content = change(gzip.decompress(path.read_bytes()) if compress else path.read_bytes())
    path.write_bytes(gzip.compress(content) if compress else content)
    with refused(str(path)) as caught:
        open_source(data_config("mnist", folder))
    assert all(word in caught.value.problems[0].reason for word in told)


def test_damaged_gzip_files_are_refused(idx_folder, data_config):
    folder, _ = idx_folder(compress=True, train=2000)
    path = folder / f"{TRAIN_IMAGES}.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:60_000])
    with refused(str(path)) as caught:
        open_source(data_config("mnist", folder))
    assert "128000" in caught.value.problems[0].reason
    found = int(caught.value.problems[0].reason.rpartition(" ")[2])
    assert 50_000 < found < 60_000  # noise does not compress
    path.write_bytes(whole[:40_000] + bytes(100) + whole[40_100:])
    with refused(str(path)):
        open_source(data_config("mnist", folder))


def test_idx_labels_must_fit_the_images_and_the_classes(idx_folder, data_config, formats):
    folder, arrays = idx_folder()
    labels = arrays[TRAIN_LABELS].copy()
    (folder / TRAIN_LABELS).write_bytes(formats.idx(labels[:-1]))
    with refused(f"{folder}/{TRAIN_LABELS}"):
        open_source(data_config("mnist", folder))
    labels[4] = 10
    (folder / TRAIN_LABELS).write_bytes(formats.idx(labels))
    with refused(f"{folder}/{TRAIN_LABELS}") as caught:
        open_source(data_config("mnist", folder))
    assert "image 4 label 10" in caught.value.problems[0].reason
    (folder / TRAIN_LABELS).unlink()
    with refused("data.root", error=NotFound) as caught:
        open_source(data_config("mnist", folder))
    assert TRAIN_LABELS in caught.value.problems[0].reason


def test_download_leaves_files_that_are_there_alone(idx_folder, data_config):
    folder, _ = idx_folder()
    before = sorted(path.name for path in folder.rglob("*"))
    assert len(open_source(data_config("mnist", folder, download=True)).splits["train"]) == 12
    assert sorted(path.name for path in folder.rglob("*")) == before


@pytest.mark.parametrize(("source", "shape"), [("mnist", {}), ("cifar10", CIFAR)])
def test_a_download_without_a_network_is_one_clear_line(data_config, tmp_path, monkeypatch, source, shape):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port: nothing listens
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    # urllib keeps the proxies that it saw first, so this test has its own opener and later ones theirs.
    monkeypatch.setattr(urllib.request, "_opener", None)
    with pytest.raises(ConnectionError) as failure:
        open_source(data_config(source, tmp_path / "new", download=True, **shape))
    assert "\n" not in str(failure.value)


@pytest.fixture
def cifar_root(tmp_path, formats, cifar_batches):
    """Writes one of the published shapes."""

    def make(shape: str):
        binary = "bin" in shape
        encode = formats.cifar_binary if binary else formats.cifar_pickle
        folder = "cifar-10-batches-bin" if binary else "cifar-10-batches-py"
        suffix = ".bin" if binary else ""
        files = {f"{folder}/{name}{suffix}": encode(*batch) for name, batch in reversed(cifar_batches.items())}
        files[f"{folder}/readme.html"] = b"<html>"
        if "tar" in shape:
            name = "cifar-10-binary.tar.gz" if binary else "cifar-10-python.tar.gz"
            (tmp_path / name).write_bytes(formats.tar(files, "w:gz"))
            return tmp_path / name if "path" in shape else tmp_path
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        return tmp_path / folder if "path" in shape else tmp_path

    return make


@pytest.mark.parametrize(
    "shape", ["py", "bin", "py path", "bin path", "py tar", "bin tar", "py tar path", "bin tar path"]
)
def test_every_shape_of_cifar_gives_the_same_images(cifar_root, cifar_batches, data_config, shape):
    source = open_source(data_config("cifar10", cifar_root(shape), **CIFAR))
    for split, names in (("train", [f"data_batch_{number}" for number in range(1, 6)]), ("test", ["test_batch"])):
        images, labels = read(source, split)
        planes = np.concatenate([cifar_batches[name][0] for name in names]).reshape(-1, 3, 32, 32)
        assert np.array_equal(images, planes.transpose(0, 2, 3, 1))
        assert labels.tolist() == np.concatenate([cifar_batches[name][1] for name in names]).tolist()
    assert source.class_names[3] == "cat"


def test_pickles_of_python_3_and_of_new_numpy_load(cifar_batches):
    images, labels = cifar_batches["test_batch"]
    for protocol in (0, 2, 4):
        content = pickle.dumps({b"data": images, b"labels": labels.tolist()}, protocol=protocol)
        for old, new in ((b"numpy._core.", b"numpy.core."), (b"numpy._core.", b"numpy._core.")):
            if protocol == 4 and old != new:
                continue  # protocol 4 writes the length of a name before it
            loaded, loaded_labels = parse_pickle(content.replace(old, new), name="batch")
            assert np.array_equal(loaded.reshape(-1, 3072), images)
            assert np.array_equal(loaded_labels, labels)


class Exploit:
    """What an attacker would pickle."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, getattr, __import__, np.load, np.memmap, sys.exit])
def test_a_pickle_that_asks_for_anything_else_is_refused(tmp_path, function):
    witness = tmp_path / "witness"
    content = pickle.dumps({b"data": Exploit(function, f"touch {witness}"), b"labels": []}, protocol=2)
    with refused("batch"):
        parse_pickle(content, name="batch")
    assert not witness.exists()


@pytest.mark.parametrize(
    "batch",
    [
        [1, 2],
        {b"data": "text", b"labels": [1]},
        {b"labels": [1]},
        {b"data": np.zeros((2, 3072), np.float32), b"labels": [1, 2]},
        {b"data": np.zeros((2, 100), np.uint8), b"labels": [1, 2]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [b"a", b"b"]},
        {b"data": np.array([[None] * 3072] * 2), b"labels": [1, 2]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]},
        # A shape that claims a terabyte before there is any data.
        {b"data": Exploit(np.zeros(1).__reduce__()[0], np.ndarray, (2**40,), b"b"), b"labels": []},
    ],
)
def test_other_content_is_not_a_batch(batch):
    with refused("batch"):
        parse_pickle(pickle.dumps(batch, protocol=2), name="batch")


def test_truncated_batches_are_refused(formats, cifar_batches):
    content = formats.cifar_pickle(*cifar_batches["test_batch"])
    for length in (0, 10, 1000, len(content) - 1):
        with refused("batch"):
            parse_pickle(content[:length], name="batch")
    with refused("batch") as caught:
        parse_binary(formats.cifar_binary(*cifar_batches["test_batch"])[:-10], name="batch")
    assert "3063" in caught.value.problems[0].reason


def test_a_batch_that_is_missing_or_has_other_labels_is_named(cifar_root, data_config):
    root = cifar_root("bin")
    path = root / "cifar-10-batches-bin" / "data_batch_2.bin"
    content = bytearray(path.read_bytes())
    content[3073] = 10
    path.write_bytes(content)
    with refused(str(path)) as caught:
        open_source(data_config("cifar10", root, **CIFAR))
    assert "image 1 label 10" in caught.value.problems[0].reason
    path.unlink()
    with refused(str(path), error=NotFound):
        open_source(data_config("cifar10", root, **CIFAR))


def test_archives_that_are_not_cifar_are_refused(cifar_root, tmp_path, formats, data_config):
    config = data_config("cifar10", tmp_path, **CIFAR)
    with refused("data.root", error=NotFound):
        open_source(config)
    path = cifar_root("py tar path")
    contents = [
        path.read_bytes()[:-20_000],
        formats.tar({"readme": b"hello"}, "w:gz"),
        formats.tar({"../../data_batch_1": b"x"}, "w:gz"),
        b"<html>",
    ]
    for content in contents:
        path.write_bytes(content)
        with refused(str(path)):
            open_source(config)
