"""Label tables next to images, in folders and archives; images without a label."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest
from image_folders import put, rows_of
from refused import refused

from ncsn.config import Config
from ncsn.data.dataset import write_dataset
from ncsn.data.sources import open_source
from ncsn.steps import train

COUNT = 12


@pytest.fixture
def images(formats) -> dict[str, bytes]:
    """Path -> PNG of gray value n, in folders that are not classes."""
    return {f"{n % 2:05d}/img{n:08d}.png": formats.image(np.full((8, 8), n, np.uint8)) for n in range(COUNT)}


def table_of(kind: str, labels: dict[str, object]) -> bytes:
    """A label table: name -> label."""
    if kind == "dataset.json":
        return json.dumps({"labels": list(labels.items())}).encode()
    if kind == "metadata.jsonl":
        rows = ({"file_name": name, "text": "a caption", "label": label} for name, label in labels.items())
        return "\n".join(map(json.dumps, rows)).encode()
    header = "file,label" if kind == "labels.csv" else "file_name,text,label"
    text = "" if kind == "labels.csv" else '"a, caption",'
    return "\r\n".join([header, *(f'"{name}",{text}{label}' for name, label in labels.items())]).encode("utf-8-sig")


def sorted_rows(source) -> list[tuple[int, int]]:
    rows = rows_of(source)
    return sorted(rows["train"] + rows["test"])


KINDS = ("metadata.jsonl", "metadata.csv", "dataset.json", "labels.csv")


@pytest.mark.parametrize("pack", [None, "tar", "zip", "outside"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_table_labels_images_however_they_are_packed(tmp_path, formats, images, data_config, kind, pack):
    table = {kind: table_of(kind, {name: number % 3 for number, name in enumerate(images)})}
    files = {**images, **table}
    if pack == "outside":
        files = {"x.zip": formats.zip(images), **table}
    elif pack:
        files = {f"x.{pack}": getattr(formats, pack)(files)}
    source = open_source(data_config("image_folder", put(tmp_path, files)))
    assert source.class_names == ("0", "1", "2")
    assert sorted_rows(source) == [(number, number % 3) for number in range(COUNT)]


def test_a_table_in_a_folder_names_images_from_there(tmp_path, formats, data_config):
    files = {}
    for split, count in (("train", 6), ("test", 4)):
        names = {f"{number}.png": ("猫", "dog")[number % 2] for number in range(count)}
        files |= {f"{split}/{name}": formats.image(np.full((8, 8), n, np.uint8)) for n, name in enumerate(names)}
        files[f"{split}/metadata.jsonl"] = table_of("metadata.jsonl", names)
    source = open_source(data_config("image_folder", put(tmp_path / "folder", files)))
    assert source.class_names == ("dog", "猫")
    assert sorted(rows_of(source)["test"]) == [(n, (n + 1) % 2) for n in range(4)]
    shards = {f"{n}.tar": formats.tar({"./1.png": files["test/1.png"], "labels.csv": b"file,label\n1.png,%d" % n})
              for n in range(4)}  # fmt: skip
    source = open_source(data_config("image_folder", put(tmp_path / "shards", shards)))
    assert sorted_rows(source) == [(1, n) for n in range(4)]


def test_tables_without_labels_are_as_if_they_were_not_there(tmp_path, images, data_config):
    tables = {
        "metadata.jsonl": b'{"file_name": "00000/img00000000.png", "text": "a cat"}',
        "metadata.csv": b"image_id,label\n1,2",
        "dataset.json": b'{"labels": null}',
        "labels.csv": b"id,breed\n1,beagle",
        "00000/dataset.json": b'{"labels": [["a.png", [0.5, 0.2]]]}',
    }
    plain = open_source(data_config("image_folder", put(tmp_path / "plain", images)))
    source = open_source(data_config("image_folder", put(tmp_path / "tables", images | tables)))
    assert source.class_names == plain.class_names == ("00000", "00001")
    assert sorted_rows(source) == sorted_rows(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_that_does_not_fit_its_images_is_named(tmp_path, images, data_config, kind):
    labels = dict.fromkeys(images, 1)
    twice = table_of(kind, labels).replace(b"img00000002", b"img00000000")
    for number, content in enumerate(
        (table_of(kind, {**labels, "00000/absent.png": 0}), table_of(kind, {**labels, "../up.png": 0}), twice, b"\xff")
    ):
        root = put(tmp_path / str(number), {**images, kind: content})
        with refused(f"{root}/{kind}"):
            open_source(data_config("image_folder", root))


def test_broken_tables_and_labels_are_named(tmp_path, images, data_config):
    name = next(iter(images))
    wrong = {
        "metadata.jsonl": json.dumps({"file_name": name, "label": {"a": 1}}).encode(),
        "labels.csv": b'file,label\n"open,1',
        "dataset.json": b'{"labels": [',
    }
    for kind, content in wrong.items():
        root = put(tmp_path / kind, {**images, kind: content})
        with refused(f"{root}/{kind}"):
            open_source(data_config("image_folder", root))
    both = {kind: table_of(kind, {name: 1}) for kind in ("labels.csv", "metadata.csv")}
    root = put(tmp_path / "both", {**images, **both})
    with refused(f"{root}/metadata.csv"):
        open_source(data_config("image_folder", root))


@pytest.mark.parametrize("missing", ["", "-1", None])
def test_images_without_a_label_beside_others_are_kept_and_counted(tmp_path, images, data_config, missing):
    labels = {name: ("cat", "dog")[number % 2] for number, name in enumerate(images)}
    for name in list(images)[:4]:
        del labels[name]
        if missing is not None:
            labels[name] = missing
    root = put(tmp_path / "images", {**images, "labels.csv": table_of("labels.csv", labels)})
    data = data_config("image_folder", root)
    source = open_source(data)
    assert source.class_names == ("cat", "dog")
    assert sorted_rows(source) == [(n, -1 if n < 4 else n % 2) for n in range(COUNT)]
    assert [label for _, label in rows_of(source)["test"]].count(-1) == 1  # they give their share as a class does
    assert write_dataset(source, str(tmp_path / "store"), name="x", data=data).manifest.unlabeled == 4


@pytest.mark.parametrize("classes", [0, 1, 2])
def test_training_is_refused_where_the_classifier_would_be(tmp_path, data_config, formats, classes):
    files = {f"{n}.png": formats.image(np.full((8, 8), n, np.uint8)) for n in range(COUNT)}
    files["labels.csv"] = table_of("labels.csv", {f"{n}.png": f"label {n % classes}" for n in range(COUNT) if classes})
    data = data_config("image_folder", put(tmp_path / "images", files))
    dataset = write_dataset(open_source(data), str(tmp_path / "store"), name="x", data=data)
    config = Config.model_validate(
        {
            "name": "x",
            "data": data,
            "network": {"kind": "unet", "widths": [8]},
            "train": {"num_images": 128, "checkpoint_every_images": 128, "report_every_images": 128},
            "sampling": {"sampler": {"kind": "annealed_langevin"}},
            "evaluation": {"extractor": "classifier"},
        }
    )
    with nullcontext() if classes > 1 else refused("evaluation.extractor"):
        train.require_classes(config, dataset.manifest, dataset.uri)
