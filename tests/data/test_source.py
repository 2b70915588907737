"""The choice of test images, places as people have them, and the identity of what was ingested before."""

from __future__ import annotations

import hashlib
import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st
from image_folders import Formats, put, rows_of, skipped_of
from refused import refused

from ncsn import storage
from ncsn.data.dataset import write_dataset
from ncsn.data.sources import OF_LIBRARIES, SOURCES, open_source
from ncsn.data.sources.base import hold_out, list_files, name_ranks, source_fingerprint
from ncsn.errors import NotFound, UserError


@given(count=st.integers(1, 200), percent=st.integers(1, 99), classes=st.integers(1, 5))
def test_each_class_gives_its_exact_share_of_the_names_that_come_first(count, percent, classes):
    names, labels = [f"image {index}" for index in range(count)], np.arange(count) % classes
    by_rank = sorted(range(count), key=lambda index: (labels[index], hashlib.sha256(names[index].encode()).digest()))
    share = Fraction(percent, 100)
    expected = sorted(by_rank[place] for place in range(count) if int((place + 1) * share) > int(place * share))
    chosen = hold_out(name_ranks(names), labels, percent / 100)
    assert chosen["test"].tolist() == (expected or by_rank[-1:] * (count > 1))
    assert sorted([*chosen["train"], *chosen["test"]]) == list(range(count))


@pytest.mark.parametrize("source", sorted(SOURCES.keys() - OF_LIBRARIES))
def test_no_root_a_missing_and_an_empty_one_are_refused(tmp_path, data_config, source):
    with refused("data.root") as caught:
        open_source(data_config(source))
    assert ("data.download" in caught.value.problems[0].hint) == (source not in ("image_folder", "parquet", "celeba"))
    with refused("data.root", error=NotFound) as caught:
        open_source(data_config(source, tmp_path / "nowhere"))
    assert caught.value.problems[0].value == str(tmp_path / "nowhere")
    with refused("data.root"):
        open_source(data_config(source, tmp_path))


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, data_config, monkeypatch):
    """Else its images, perhaps a whole class, would be missing and nothing would say so."""
    put(tmp_path, {"cat/1.png": b"1"})
    (tmp_path / "dog").mkdir()
    list_folder = os.scandir

    def scandir(folder: str) -> Any:
        if Path(folder).name in {"dog", "lost+found"}:
            raise PermissionError(13, "Permission denied", folder)
        return list_folder(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with refused("data.root") as caught:
        list_files(data_config("image_folder", tmp_path))
    assert caught.value.problems[0].value == str(tmp_path / "dog")
    (tmp_path / "dog").rename(tmp_path / "lost+found")  # as at the top of an ext4 volume, and no user can change it
    assert list_files(data_config("image_folder", tmp_path)).to_pylist() == ["cat/1.png"]


def test_the_same_images_and_settings_stay_the_same_dataset(tmp_path, members, data_config):
    data = data_config("image_folder", put(tmp_path / "images", members))
    dataset = write_dataset(open_source(data), str(tmp_path / "store"), name="x", data=data)
    assert dataset.manifest.digest == "07a0ea85fe7b4e50"
    stored = json.loads(Path(dataset.uri, "manifest.json").read_text())
    assert list(stored["settings"]) == [
        "source", "image_column", "label_column", "image_size", "channels", "dtype", "value_range", "fit", "crop",
        "background", "test_fraction", "max_images", "leave_out", "on_bad_image", "max_megapixels",
    ]  # fmt: skip


def test_odd_names_and_links_are_read(tmp_path, data_config):
    image = Formats.image(np.full((8, 8), 50, np.uint8))
    names = ("кошка/мяу 1.png", "猫/二.png", "gato/ñandú\n3.png", "x.png/4.PNG", "x.png/🙂.png", "dog/' \" $(5).png")
    root = Path(put(tmp_path / "images", dict.fromkeys(names, image)))
    put(tmp_path / "elsewhere", {"far.png": image})
    (root / "dog" / "far.png").symlink_to(tmp_path / "elsewhere" / "far.png")
    (root / "dog" / "gone.png").symlink_to(tmp_path / "nowhere")
    (root / "dog" / "loop.png").symlink_to(root / "dog" / "loop.png")
    (root / "dog" / "up").symlink_to(root)
    (root / "wolf").symlink_to(tmp_path / "elsewhere")
    source = open_source(data_config("image_folder", root, follow_links=True))
    assert source.class_names == ("dog", "gato", "wolf", "x.png", "кошка", "猫")
    assert sum(map(len, rows_of(source).values())) == 8 and skipped_of(source) == []


def test_a_name_that_is_not_text_is_refused(tmp_path, data_config):
    image = Formats.image(np.full((8, 8), 50, np.uint8))
    (tmp_path / "images").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/images/caf\xe9.png")).write_bytes(image)
    for read in (open_source, source_fingerprint):
        with refused("data.root"):
            read(data_config("image_folder", tmp_path / "images"))
    root = put(tmp_path / "tar", {"a.tar": Formats.tar({"caf\udce9.png": image})})
    with refused(f"{root}/a.tar"):
        open_source(data_config("image_folder", root))


def test_a_file_that_goes_and_one_that_may_not_be_read_are_refused(tmp_path, members, data_config, monkeypatch):
    root = put(tmp_path / "images", members)
    source = open_source(data_config("image_folder", root, on_bad_image="skip"))
    Path(root, "cat", "03.png").unlink()
    with refused(f"{root}/cat/03.png"):
        rows_of(source)
    put(root, {"cat/03.png": members["cat/03.png"]})

    def locked(path: str, mode: str) -> Any:
        if path.endswith("04.png"):
            raise PermissionError(13, "Permission denied", path)
        return open(path, mode)  # noqa: PTH123

    monkeypatch.setattr(storage, "open", locked, raising=False)
    with refused(f"{root}/cat/04.png"):
        rows_of(open_source(data_config("image_folder", Path(root, "cat"), on_bad_image="skip")))


NO_NAMES = (".", "..", "a\nb", "\x1b[31m", "a\u2028b", "\udcff", "x" * 256, "é" * 128, "9" * 5000)
PLACES = ("words.parquet", "names.parquet", "metadata.jsonl", "classes.json", "x.tar")


def labeled(root: Path, place: str, name: str) -> None:
    """Eight images below `root`, half of which have the label `name`, as this file says."""
    draw = np.random.default_rng(0)
    pngs = [Formats.image(draw.integers(0, 256, (8, 8), np.uint8)) for _ in range(8)]
    files, words = [f"{'ab'[number % 2]}/{number}.png" for number in range(8)], [name, "b"] * 4
    if place.endswith(".parquet"):
        feature = {"label": {"names": [name, "b"], "_type": "ClassLabel"}} if place == "names.parquet" else {}
        column = [number % 2 for number in range(8)] if feature else words
        hub = {"huggingface": json.dumps({"info": {"features": feature}})}
        pq.write_table(pa.table({"image": pngs, "label": column}).replace_schema_metadata(hub), root / place)
    elif place == "x.tar":
        members = {f"{word}/{file}": png for word, file, png in zip(words, files, pngs, strict=True)}
        put(root, {place: Formats.tar(members)})
    else:
        rows = [json.dumps({"file_name": file, "label": word}) for file, word in zip(files, words, strict=True)]
        content = {"metadata.jsonl": "\n".join(rows), "classes.json": json.dumps({"a": name})}
        put(root, dict(zip(files, pngs, strict=True)) | {place: content[place].encode()})


def test_tables_of_folders_under_two_splits_add_up_and_may_not_contradict(tmp_path, data_config) -> None:
    for split, table in (("train", {"a": "cat"}), ("test", {"b": "dog"})):
        labeled(tmp_path / split, "classes.json", "cat")
        (tmp_path / split / "classes.json").write_text(json.dumps(table))
    data = data_config("image_folder", tmp_path)
    assert open_source(data).class_names == ("cat", "dog")
    (tmp_path / "test" / "classes.json").write_text(json.dumps({"a": "dog"}))
    with refused(f"{tmp_path}/train/classes.json"):
        open_source(data)


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda name: ascii(name[:9]))
@pytest.mark.parametrize("place", PLACES)
def test_what_no_path_or_line_can_hold_is_no_name_of_a_class(tmp_path, data_config, place: str, name: str) -> None:
    if (place, name) in (("words.parquet", "\udcff"), ("x.tar", ".")):
        pytest.skip("there is no such thing")
    data = data_config("parquet" if place.endswith("parquet") else "image_folder", tmp_path)
    labeled(tmp_path, place, name)
    with pytest.raises(UserError) as caught:
        open_source(data)
    assert len(str(caught.value).splitlines()) == 1
    labeled(tmp_path, place, "good")
    assert sorted(open_source(data).class_names) == ["b", "good"]
    labeled(tmp_path, place, "b")  # in `classes.json` as in the other places, so that folders of one class are one
    if place != "names.parquet":
        assert open_source(data).class_names == ("b",)
        return
    with refused("data.root"):
        open_source(data)
