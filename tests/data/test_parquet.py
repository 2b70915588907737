"""Writing datasets and reading them back, on a disk and in a bucket."""

from __future__ import annotations

import csv
import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_folders import GeneratedSplit, files_below
from refused import refused

from ncsn import storage
from ncsn.data.dataset import write_dataset
from ncsn.data.duplicates import DUPLICATES, Duplicate, from_csv, to_csv
from ncsn.data.format import Rows, load_manifest, read_split, to_table
from ncsn.data.pixels import Example
from ncsn.data.sources.base import Source
from ncsn.errors import InvalidValue, NotFound
from ncsn.progress import Progress


@pytest.fixture
def images(rng):
    """Split -> 50 and 20 random RGB images."""
    return {
        split: Rows(rng.integers(0, 256, (count, 8, 8, 3), np.uint8), rng.integers(0, 3, count))
        for split, count in (("train", 50), ("test", 20))
    }


@pytest.fixture
def config(data_config):
    return data_config("image_folder", channels=3)


def source_of(images, **fields) -> Source:
    def split(rows: Rows) -> GeneratedSplit:
        return GeneratedSplit(len(rows), lambda: map(Example, rows.images, rows.labels.tolist()))

    splits = {name: split(rows) for name, rows in images.items()}
    return Source("noise", "none", **{"class_names": ("a", "b", "c"), "splits": splits, **fields})


def write(images, folder, config, **fields):
    return write_dataset(source_of(images, **fields), str(folder), name="noise", data=config)


def write_each(parts, known):
    return (part.write(known, cores=1) for part in parts)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_what_is_written_reads_back(request, tmp_path, images, config, place, monkeypatch):
    folder = str(tmp_path / "noise") if place == "local" else f"{request.getfixturevalue('s3_root')}/datasets/noise"
    monkeypatch.setattr("ncsn.data.format.PART_IMAGES", 16)
    dataset = write(images, folder, config)
    assert dataset.created and dataset.uri == f"{folder}/{dataset.manifest.digest}"
    for split, rows in images.items():
        read, few = read_split(dataset.uri, split), read_split(dataset.uri, split, range(17))
        assert np.array_equal(read.images, rows.images) and np.array_equal(read.labels, rows.labels)
        assert np.array_equal(few.images, rows.images[:17])
    assert storage.list_names(f"{dataset.uri}/train") == [f"part-0000{part}.parquet" for part in range(4)]
    assert not write(images, folder, config).created
    assert storage.list_names(folder) == [dataset.manifest.digest]


def test_the_lines_of_the_docs_read_a_part(tmp_path, images, config, monkeypatch):
    dataset = write(images, tmp_path, config)
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    lines = page.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(Path(dataset.uri) / "train")
    names: dict[str, Any] = {}
    exec(lines, names)
    assert np.array_equal(names["images"], images["train"].images)


def test_the_manifest_is_the_same_for_any_writer_and_any_blocks(tmp_path, images, config, monkeypatch):
    monkeypatch.setattr("ncsn.data.format.PART_IMAGES", 30)
    manifest = write(images, tmp_path / "a", config).manifest
    assert load_manifest(f"{tmp_path}/a/{manifest.digest}") == manifest
    assert manifest.counts == {"train": 50, "test": 20} and manifest.pixels.shape == (8, 8, 3)
    assert manifest.class_counts == {s: np.bincount(rows.labels, minlength=3).tolist() for s, rows in images.items()}
    assert [part.rows for part in manifest.parts["train"]] == [30, 20]
    for number, part in enumerate(manifest.parts["train"]):
        rows = slice(30 * number, 30 * number + 30)
        digest = hashlib.sha256(images["train"].images[rows].tobytes() + images["train"].labels[rows].tobytes())
        assert part.digest == digest.hexdigest()
    assert "root" not in manifest.settings  # where the files lay is no property of their content
    assert json.loads((tmp_path / "a" / manifest.digest / "manifest.json").read_text())["format_version"] == 5
    monkeypatch.setattr("ncsn.data.dataset._BLOCK_BYTES", 7 * 8 * 8 * 3)
    assert write(images, tmp_path / "b", config).manifest == manifest
    monkeypatch.setattr("ncsn.data.dataset.open_images", None)  # parts that others write are not read again
    source, folder = source_of(images), str(tmp_path / "c")
    assert write_dataset(source, folder, name="noise", data=config, write_parts=write_each).manifest == manifest


@pytest.mark.parametrize("mirrors", [{}, {"horizontal_flip": True}, {"augmentation": {"probability": 0.5}}])
@pytest.mark.parametrize("write_parts", [None, write_each])
def test_test_images_that_equal_training_images_are_left_out(
    tmp_path, images, data_config, monkeypatch, mirrors, write_parts
):
    """Mirror images too where training mirrors; those that repeat stay, and what is left is as without the others."""
    config = data_config("image_folder", channels=3, **mirrors)
    train, test = images["train"], images["test"]
    equal = np.concatenate([train.images[[49, 3]], train.images[[0, 40, 40], :, ::-1]])
    given = {
        "train": Rows(np.concatenate([train.images, train.images[:4]]), np.append(train.labels, train.labels[:4])),
        "test": Rows(np.concatenate([equal, test.images, test.images[5:7]]), np.arange(27) % 3),
    }
    monkeypatch.setattr("ncsn.data.format.PART_IMAGES", 2)  # the first test part has nothing left
    monkeypatch.setattr("ncsn.data.dataset._BLOCK_BYTES", 8 * 8 * 3)
    progress = Progress()
    how = {"write_parts": write_parts, "progress": progress}
    found = write_dataset(source_of(given), str(tmp_path), name="noise", data=config, **how)
    left_out = 5 if mirrors else 2
    expected = Rows(given["test"].images[left_out:], given["test"].labels[left_out:])
    assert (found.manifest.repeated, found.manifest.left_out) == ({"train": 4, "test": 2 if mirrors else 3}, left_out)
    assert found.manifest.counts == {"train": 54, "test": len(expected)} and progress.done == progress.total == 81
    assert np.array_equal(read_split(found.uri, "test").images, expected.images)
    assert np.array_equal(read_split(found.uri, "test").labels, expected.labels)
    assert sum(found.manifest.class_counts["test"]) == len(expected)
    lines = from_csv(Path(found.uri, DUPLICATES).read_text())
    mirrored = [each.path for each in lines if each.kind == "mirrored"]
    assert mirrored == (["train image 0", "train image 40", "train image 40"] if mirrors else [])
    assert len(lines) == sum(found.manifest.repeated.values()) + left_out
    assert ("train image 3", "train image 53") in [each[:2] for each in lines]


def test_any_change_of_the_content_changes_the_digest(tmp_path, images, config):
    def changed(split, *, pixel=0, label=0):
        rows = Rows(images[split].images.copy(), images[split].labels.copy())
        rows.images[3, 4, 5, 1] ^= pixel
        rows.labels[2] = (rows.labels[2] + label) % 3
        return {**images, split: rows}

    backwards = {**images, "train": Rows(images["train"].images[::-1], images["train"].labels[::-1])}
    shorter = {**images, "train": Rows(images["train"].images[:-1], images["train"].labels[:-1])}
    pixels, label = [changed(split, pixel=1) for split in ("train", "test")], changed("test", label=1)
    variants = [images, *pixels, label, backwards, shorter]
    digests = {write(variant, tmp_path, config).manifest.digest for variant in variants}
    digests.add(write(images, tmp_path, config, class_names=("a", "b", "d")).manifest.digest)
    assert len(digests) == 7


def test_memory_does_not_grow_with_the_dataset(tmp_path, data_config, monkeypatch):
    monkeypatch.setattr("ncsn.data.noise_levels.MOST_IMAGES", 10)  # the sample for the noise levels has its own bound
    image = np.zeros((64, 64, 3), np.uint8)

    def peak(count: int) -> int:
        splits = {
            name: GeneratedSplit(count, lambda gray=gray: (Example(image + np.uint8(gray), 0) for _ in range(count)))
            for gray, name in enumerate(("train", "test"))
        }
        tracemalloc.start()
        pa.default_memory_pool().release_unused()
        data = data_config("image_folder", image_size=64, channels=3)
        write_dataset(Source("zeros", "none", ("a",), splits), f"{tmp_path}/{count}", name="zeros", data=data)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    few, many = peak(300), peak(1500)
    assert many < 1.5 * few and many < 1500 * image.nbytes / 2


def test_too_few_images_are_refused_and_leave_nothing_behind(tmp_path, images, config):
    few = {**images, "test": Rows(images["test"].images[:1], images["test"].labels[:1])}
    with refused("data.source"):
        write(few, tmp_path, config)
    assert files_below(tmp_path) == []


def test_datasets_that_cannot_be_read_are_named(tmp_path, images, config):
    with refused(str(tmp_path), error=NotFound):
        load_manifest(str(tmp_path))
    uri = write(images, tmp_path, config).uri
    with pytest.raises(InvalidValue, match="valid"):
        read_split(uri, "valid")
    part = Path(uri, "train", "part-00000.parquet")
    pq.write_table(to_table(Rows(images["train"].images[:9], images["train"].labels[:9])), part)
    for content in (part.read_bytes(), part.read_bytes()[:-9]):  # of fewer images, and damaged
        part.write_bytes(content)
        with refused(str(part)):
            read_split(uri, "train")
    part.unlink()
    with refused(str(part), error=NotFound):
        read_split(uri, "train")
    path = Path(uri) / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 5', '"format_version": 1'))
    with refused(uri):
        load_manifest(uri)


def test_no_name_in_the_list_of_duplicates_is_a_formula():
    """As a spreadsheet opens it; read again, each is what it was."""
    names = ("=1+1", "+1", "-1", "@a", "'=b", "'c", "d=e")
    lines = [Duplicate(name, "x", "equal", name, "y") for name in names]
    text = to_csv(lines)
    assert not [value for line in csv.reader(text.splitlines()) for value in line if value[0] in "=+-@"]
    assert from_csv(text) == sorted(lines)
