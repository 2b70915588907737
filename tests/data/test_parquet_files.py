"""Published Parquet files: columns, classes and splits are found, sections read only their rows, mistakes by name."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_folders import Formats, rows_of, skipped_of, sorted_rows
from refused import refused

from ncsn import storage
from ncsn.data.dataset import write_dataset
from ncsn.data.format import read_split
from ncsn.data.sources import open_source
from ncsn.data.sources.parquet_files import split_of

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["cat", "dog", "owl"]


def encoded(value: int, *, kind: str = "PNG") -> bytes:
    return Formats.image(np.full((9, 8), value, np.uint8), kind)


def pictures(values: Sequence[int]) -> pa.Array:
    return pa.array([{"bytes": encoded(value), "path": f"{value}.png"} for value in values], PICTURE)


FEATURES = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}


def write(uri: str | Path, columns: dict[str, Any], *, features: dict[str, Any] | None = None, **options: Any) -> str:
    """Write a Parquet file, with features as Hugging Face's `datasets` writes them; gives its URI."""
    hub = {"huggingface": json.dumps({"info": {"features": features}})} if features else None
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(hub), buffer, **options)
    storage.write_bytes(str(uri), buffer.getvalue())
    return str(uri)


def published(uri: str | Path, values: Sequence[int], **options: Any) -> str:
    """A file as on the Hub, whose image of value v has the label v % 3."""
    columns = {"image": pictures(values), "label": pa.array([value % 3 for value in values], pa.int64())}
    return write(uri, columns, features=FEATURES, **options)


def labeled(values: Sequence[int]) -> list[tuple[int, int]]:
    return [(value, value % 3) for value in values]


@pytest.fixture
def source_of(data_config) -> Callable[..., Any]:
    return lambda root, **settings: open_source(data_config("parquet", root, **settings))


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_files_of_the_hub_need_no_settings(request, tmp_path, source_of, place):
    root = tmp_path if place == "folder" else request.getfixturevalue("s3_root")
    published(f"{root}/data/train-00000-of-00002.parquet", range(20), row_group_size=7)
    published(f"{root}/data/train-00001-of-00002.parquet", range(20, 50), row_group_size=7)
    published(f"{root}/data/validation-00000-of-00001.parquet", range(50, 55))
    published(f"{root}/data/test-00000-of-00001.parquet", range(60, 70))
    storage.write_bytes(f"{root}/README.md", b"---\n")
    source = source_of(root)
    assert source.class_names == tuple(NAMES)
    assert rows_of(source) == {"train": labeled(range(50)), "test": labeled(range(60, 70))}
    assert [row.label for row in source.splits["train"].section(18, 23).stream(cores=1)] == [0, 1, 2, 0, 1]


def test_names_tell_the_splits():
    splits = {"data/valid-00000-of-00001-9a1b.parquet": "validation", "eval/train2017.PARQUET": "train"}
    none = "train_test.parquet", "trained/0000.parquet", "0000.parquet"
    for path, split in (splits | dict.fromkeys(none)).items():
        assert split_of(path)[1] == split


def test_folds_are_refused_and_one_of_them_is_not(tmp_path, source_of):
    """The test images of one fold train another."""
    for fold, held in ((0, range(5)), (1, range(5, 10))):
        rest = [n for n in range(10) if n not in held]
        published(tmp_path / f"fold_{fold}" / "train" / "0.parquet", rest)
        published(tmp_path / f"fold_{fold}" / "test" / "0.parquet", held)
    with refused(str(tmp_path / "fold_1" / "test" / "0.parquet")):
        source_of(tmp_path)
    assert rows_of(source_of(tmp_path / "fold_0"))["test"] == labeled(range(5))


def test_however_rows_are_cut_they_are_the_same_dataset(tmp_path, s3_root, data_config):
    """Without a test split the choice of test images is that of the rows, not of the files."""

    def digest(root: str | Path) -> str:
        data = data_config("parquet", root)
        return write_dataset(open_source(data), str(tmp_path / "store"), name="x", data=data).manifest.digest

    whole = published(tmp_path / "whole" / "train.parquet", range(40))
    published(tmp_path / "cut" / "0.parquet", range(13), row_group_size=5)
    published(tmp_path / "cut" / "1.parquet", range(13, 40), row_group_size=2, compression="zstd")
    published(f"{s3_root}/cut/0.parquet", range(31))
    published(f"{s3_root}/cut/1.parquet", range(31, 40))
    assert len({digest(root) for root in (whole, tmp_path / "whole", tmp_path / "cut", f"{s3_root}/cut")}) == 1
    published(f"{s3_root}/cut/1.parquet", range(32, 41))
    assert digest(f"{s3_root}/cut") != digest(whole)


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct", "large_struct", "jpeg"])
def test_images_are_found_by_their_type(tmp_path, source_of, kind):
    values = [8 * number for number in range(12)]
    images = [encoded(value, kind="JPEG" if kind == "jpeg" else "PNG") for value in values]
    large_struct = pa.struct([("path", pa.string()), ("bytes", pa.large_binary())])
    types = {"large_binary": pa.large_binary(), "struct": PICTURE, "large_struct": large_struct}
    rows = [{"bytes": image, "path": None} for image in images] if "struct" in kind else images
    columns = {"id": pa.array(range(12)), "x": pa.array(rows, types.get(kind, pa.binary())), "note": ["a"] * 12}
    source = source_of(write(tmp_path / "x.parquet", columns))
    assert source.class_names == ()
    assert sorted_rows(source) == [(value, -1) for value in values]


def test_the_usual_names_and_the_metadata_decide_between_columns(tmp_path, source_of):
    images, others = pictures(range(12)), pictures(range(100, 112))
    numbers = pa.array([number % 2 for number in range(12)])
    both = {"mask": others, "image": images, "label": numbers, "id": numbers}
    found = sorted_rows(source_of(write(tmp_path / "names.parquet", both)))
    assert found == [(number, number % 2) for number in range(12)]
    columns = {"audio": others, "photograph": images, "fine": numbers, "label": pa.array(range(12))}
    features = {"audio": {"_type": "Audio"}, "photograph": {"_type": "Image"}, "label": {"_type": "Value"}}
    features["fine"] = {"names": ["a", "b"], "_type": "ClassLabel"}
    source = source_of(write(tmp_path / "marked.parquet", columns, features=features))
    assert source.class_names == ("a", "b")
    assert sorted_rows(source) == [(number, number % 2) for number in range(12)]


def test_settings_choose_the_columns(tmp_path, source_of):
    columns = {"left": pictures(range(12)), "right": pictures(range(100, 112))}
    columns |= {"coarse": pa.array([n % 2 for n in range(12)]), "fine": pa.array([n % 4 for n in range(12)])}
    coarse, fine = {"names": ["a", "b"]}, {"names": ["p", "q", "r", "s"]}
    features = {"coarse": {**coarse, "_type": "ClassLabel"}, "fine": {**fine, "_type": "ClassLabel"}}
    path = write(tmp_path / "x.parquet", columns, features=features)
    with refused("data.image_column"):
        source_of(path)
    with refused("data.label_column") as caught:
        source_of(path, image_column="right")
    assert "coarse or fine" in caught.value.problems[0].hint
    source = source_of(path, image_column="right", label_column="fine")
    assert source.class_names == ("p", "q", "r", "s")
    assert (103, 3) in rows_of(source)["train"] + rows_of(source)["test"]
    assert source_of(path, image_column="left", label_column="none").class_names == ()
    for settings in ({"image_column": "fine"}, {"image_column": "left", "label_column": "right"}):
        with refused(f"data.{list(settings)[-1]}") as caught:
            source_of(path, **settings)
        assert caught.value.problems[0].value == list(settings.values())[-1]


def test_labels_without_metadata_are_words_or_numbers(tmp_path, source_of):
    words = [["owl", "cat", None, ""][number % 4] for number in range(16)]
    for array in (pa.array(words), pa.array(words).dictionary_encode()):
        source = source_of(write(tmp_path / "words.parquet", {"image": pictures(range(16)), "label": array}))
        assert source.class_names == ("cat", "owl")
        assert [label for _, label in sorted_rows(source)] == [1, 0, -1, -1] * 4
    numbers = pa.array([[2, 0, None, -1][number % 4] for number in range(16)], pa.int8())
    source = source_of(write(tmp_path / "numbers.parquet", {"image": pictures(range(16)), "class": numbers}))
    assert source.class_names == ("0", "1", "2")
    assert [label for _, label in sorted_rows(source)] == [2, 0, -1, -1] * 4


def test_a_label_that_is_no_class_is_named_with_its_row(tmp_path, source_of):
    for wrong in (3, -2):
        labels = pa.array([0, 1, 2, None, -1, 2, wrong, 1], pa.int64())
        path = write(tmp_path / "x.parquet", {"image": pictures(range(8)), "label": labels}, features=FEATURES)
        with refused(f"{path}:row 6"):
            source_of(path)


def test_bad_images_are_named_with_their_row(tmp_path, source_of):
    rows = [{"bytes": encoded(number), "path": None} for number in range(10)]
    rows[2], rows[5], rows[7] = None, {"bytes": None, "path": "elsewhere.png"}, {"bytes": b"broken", "path": None}
    source = source_of(write(tmp_path / "train.parquet", {"image": pa.array(rows, PICTURE)}, row_group_size=4))
    assert sorted(skipped_of(source)) == [f"{tmp_path}/train.parquet:row {row}" for row in (2, 5, 7)]
    assert [value for value, _ in sorted_rows(source)] == [0, 1, 3, 4, 6, 8, 9]


def test_a_dataset_of_a_store_is_read_as_it_is(tmp_path, data_config, idx_folder):
    folder, _ = idx_folder()
    data = data_config("mnist", folder)
    first = write_dataset(open_source(data), str(tmp_path / "store"), name="x", data=data)
    again = data_config("parquet", first.uri)
    second = write_dataset(open_source(again), str(tmp_path / "store"), name="x", data=again)
    assert (second.manifest.digest, second.created) == (first.manifest.digest, False)
    larger = data_config("parquet", first.uri, image_size=16, channels=3)
    third = write_dataset(open_source(larger), str(tmp_path / "store"), name="x", data=larger)
    assert read_split(third.uri, "test").images.shape == (5, 16, 16, 3)
    assert list(third.manifest.class_names) == list("0123456789")


def test_roots_that_cannot_be_used_are_named(tmp_path, source_of):
    (tmp_path / "notes.txt").write_text("x")
    for root in (tmp_path, tmp_path / "notes.txt"):
        with refused("data.root"):
            source_of(root)
    good = published(tmp_path / "train-0.parquet", range(40))
    content = Path(good).read_bytes()
    for damaged in (b"", b"version https://git-lfs.github.com/spec/v1\n", content[: len(content) // 2], content[:-3]):
        bad = tmp_path / "train-1.parquet"
        bad.write_bytes(damaged)
        with refused(str(bad)):
            source_of(tmp_path)
    plain = write(tmp_path / "train-1.parquet", {"text": ["a"], "label": [1]})
    with refused(plain) as caught:
        source_of(tmp_path)
    assert "text (string)" in caught.value.problems[0].reason


def test_files_that_do_not_belong_together_are_named(tmp_path, source_of):
    published(tmp_path / "train-0.parquet", range(10))
    other = tmp_path / "train-1.parquet"
    image, label = pictures(range(10)), pa.array([0] * 10)
    others = FEATURES | {"label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
    for columns in ({"image": image, "label": label}, {"image": image}, {"picture": image, "label": label}):
        write(other, columns, features=others if columns.keys() == {"image", "label"} else None)
        with refused(str(other)):
            source_of(tmp_path)
    stray = other.rename(tmp_path / "more.parquet")
    published(stray, range(10))
    with refused(str(stray)):
        source_of(tmp_path)
    (tmp_path / "train-0.parquet").rename(tmp_path / "val.parquet")
    stray.rename(tmp_path / "test.parquet")
    with refused(str(tmp_path / "test.parquet")):
        source_of(tmp_path)


def test_a_change_and_damage_between_good_ends_are_noticed_by_those_who_read_the_row_group(tmp_path, source_of):
    options = {"compression": "zstd", "write_page_checksum": True, "row_group_size": 20}
    path = Path(published(tmp_path / "train.parquet", range(60), **options))
    published(tmp_path / "test.parquet", range(60, 80))
    split, content = source_of(tmp_path).splits["train"], bytearray(path.read_bytes())
    content[200:220] = bytes(20)
    path.write_bytes(content)
    with refused(str(path)):
        list(split.stream())
    assert [int(row.image[0, 0, 0]) for row in split.section(33, 47).stream()] == list(range(33, 47))
    published(path, range(100, 140), **options)
    with refused(str(path)):
        list(split.stream())
