"""CIFAR-10 in each of its published shapes, and pickles that are not what they seem."""

from __future__ import annotations

import os
import pickle
import sys

import numpy as np
import pytest
from refused import refused

from ncsn.data.cifar10 import parse_binary, parse_pickle
from ncsn.data.sources import open_source
from ncsn.errors import NotFound

TRAIN = [f"data_batch_{number}" for number in range(1, 6)]


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
            (tmp_path / name).write_bytes(formats.tar(files))
            return tmp_path / name if "path" in shape else tmp_path
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        return tmp_path / folder if "path" in shape else tmp_path

    return make


@pytest.mark.parametrize(
    "shape", ["py", "bin", "py path", "bin path", "py tar", "bin tar", "py tar path", "bin tar path"]
)
def test_every_shape_gives_the_same_images(cifar_root, cifar_batches, data_config, shape):
    source = open_source(data_config("cifar10", cifar_root(shape), image_size=32, channels=3))
    for split, names in (("train", TRAIN), ("test", ["test_batch"])):
        examples = list(source.splits[split].stream())
        planes = np.concatenate([cifar_batches[name][0] for name in names]).reshape(-1, 3, 32, 32)
        assert np.array_equal(np.stack([example.image for example in examples]), planes.transpose(0, 2, 3, 1))
        assert [example.label for example in examples] == np.concatenate([cifar_batches[n][1] for n in names]).tolist()
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


def test_a_pickle_cannot_claim_memory_by_a_shape():
    reconstruct = np.zeros(1).__reduce__()[0]
    content = pickle.dumps({b"data": Exploit(reconstruct, np.ndarray, (2**40,), b"b"), b"labels": []}, protocol=2)
    with refused("batch"):
        parse_pickle(content, name="batch")


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
    ],
)
def test_other_content_is_not_a_batch(batch):
    with refused("batch"):
        parse_pickle(pickle.dumps(batch, protocol=2), name="batch")


def test_labels_must_be_as_many_as_images():
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}
    with refused("batch"):
        parse_pickle(pickle.dumps(batch, protocol=2), name="batch")


def test_truncated_batches_are_refused(formats, cifar_batches):
    content = formats.cifar_pickle(*cifar_batches["test_batch"])
    for length in (0, 10, 1000, len(content) - 1):
        with refused("batch"):
            parse_pickle(content[:length], name="batch")
    binary = formats.cifar_binary(*cifar_batches["test_batch"])
    with refused("batch") as caught:
        parse_binary(binary[:-10], name="batch")
    assert "2 images and 3063 bytes" in caught.value.problems[0].reason


def test_labels_out_of_range_are_refused(cifar_root, data_config):
    root = cifar_root("bin")
    path = root / "cifar-10-batches-bin" / "data_batch_2.bin"
    content = bytearray(path.read_bytes())
    content[3073] = 10
    path.write_bytes(content)
    with refused(str(root / "cifar-10-batches-bin" / "data_batch_2.bin")) as caught:
        list(open_source(data_config("cifar10", root, image_size=32, channels=3)).splits["train"].stream())
    assert "image 1 label 10" in caught.value.problems[0].reason


def test_a_missing_batch_is_named(cifar_root, data_config):
    root = cifar_root("py")
    (root / "cifar-10-batches-py" / "data_batch_4").unlink()
    with refused(str(root / "cifar-10-batches-py" / "data_batch_4"), error=NotFound):
        open_source(data_config("cifar10", root, image_size=32, channels=3))


def test_an_archive_cut_short_is_refused(cifar_root, data_config):
    path = cifar_root("py tar path")
    path.write_bytes(path.read_bytes()[:-20_000])
    with refused(str(path)):
        open_source(data_config("cifar10", path, image_size=32, channels=3))


def test_an_archive_of_something_else_is_refused(tmp_path, formats, data_config):
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(formats.tar({"readme": b"hello"}))
    with refused(str(path)) as caught:
        open_source(data_config("cifar10", tmp_path, image_size=32, channels=3))
    assert "data_batch_1" in caught.value.problems[0].reason
    path.write_bytes(b"<html>")
    with refused(str(path)):
        open_source(data_config("cifar10", tmp_path, image_size=32, channels=3))


def test_an_archive_with_a_name_outside_of_it_is_refused(tmp_path, formats, data_config):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(formats.tar({"../../data_batch_1": b"x"}))
    with refused(str(tmp_path / "cifar-10-python.tar.gz")):
        open_source(data_config("cifar10", tmp_path, image_size=32, channels=3))


def test_an_empty_folder_says_what_to_put_there(tmp_path, data_config):
    with refused("data.root", error=NotFound):
        open_source(data_config("cifar10", tmp_path, image_size=32, channels=3))
