"""Images in archives and buckets: the same rows as the same images in a folder, and mistakes by name."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from refused import refused

from ncsn.data.listing import list_files, source_fingerprint
from ncsn.data.parquet import read_split, write_dataset
from ncsn.data.sources import open_source
from ncsn.errors import NotFound, UserError
from ncsn.storage import write_bytes
from ncsn.storage.files import _s3_filesystem


@pytest.fixture
def members(formats) -> dict[str, bytes]:
    """Path -> PNG of one gray value, in two class folders."""
    return {
        f"{name}/{number:02d}.png": formats.image(np.full((8, 8), 10 * number + place, np.uint8))
        for place, name in enumerate(("cat", "dog"))
        for number in range(20)
    }


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def put(root: Path | str, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        write_bytes(f"{root}/{name}", content)
    return str(root)


def halves(members: dict[str, bytes]) -> list[dict[str, bytes]]:
    names = list(members)
    return [{name: members[name] for name in names[start::2]} for start in (0, 1)]


@pytest.fixture
def digest_of(tmp_path, data_config):
    def digest(root: str, **settings) -> str:
        data = data_config("image_folder", root, **settings)
        return write_dataset(open_source(data), str(tmp_path / "store"), name="x", data=data).manifest.digest

    return digest


def test_however_images_are_packed_they_are_the_same_dataset(tmp_path, s3_root, members, digest_of):
    one, other = halves(members)
    roots = [
        put(tmp_path / "folder", members),
        put(tmp_path / "tar", {"images.tar": tar_of(members)}),
        put(tmp_path / "zip", {"images.zip": zip_of(members)}),
        put(tmp_path / "stored", {"images.ZIP": zip_of(members, zipfile.ZIP_STORED)}),
        put(tmp_path / "shards", {"0.tar": tar_of(one), "1.tar": tar_of(other)}),
        put(tmp_path / "both", {"a.tar": tar_of(other), "b.zip": zip_of(one)}),
        str(tmp_path / "tar" / "images.tar"),
        put(f"{s3_root}/folder", members),
        put(f"{s3_root}/shards", {"0.tar": tar_of(one), "1.zip": zip_of(other)}),
    ]
    assert len({digest_of(root) for root in roots}) == 1
    assert digest_of(roots[0]) != digest_of(put(tmp_path / "fewer", one))


def test_the_folder_of_a_shard_can_be_a_split(tmp_path, members, data_config):
    one, other = halves(members)
    root = put(tmp_path, {"train/0.tar": tar_of(one), "test/0.tar": tar_of(other)})
    source = open_source(data_config("image_folder", root))
    assert {split: part.count for split, part in source.splits.items()} == {"train": 20, "test": 20}
    assert source.class_names == ("cat", "dog")
    assert {int(i[0, 0, 0]) for i, _ in source.splits["train"].stream()} == {
        20 * n + c for n in range(10) for c in (0, 1)
    }


@pytest.mark.parametrize("kind", ["cls", "json"])
def test_labels_beside_the_images_are_the_classes(tmp_path, formats, data_config, kind):
    members = {}
    for number in range(30):
        label = number % 3
        members[f"{number:04d}.png"] = formats.image(np.full((8, 8), number, np.uint8))
        members[f"{number:04d}.{kind}"] = (
            str(label).encode() if kind == "cls" else json.dumps({"label": label}).encode()
        )
    source = open_source(data_config("image_folder", put(tmp_path, {"shard.tar": tar_of(members)})))
    rows = [row for split in source.splits.values() for row in split.stream()]
    assert len(rows) == 30
    assert all(int(image[0, 0, 0]) % 3 == label for image, label in rows)
    assert source.class_names == ("0", "1", "2")


def test_labels_in_words_are_sorted_and_a_missing_one_is_named(tmp_path, formats, data_config):
    image = formats.image(np.zeros((8, 8), np.uint8))
    members = {"a.png": image, "a.cls": b"wolf\n", "b.png": image, "b.cls": b"bear"}
    assert open_source(data_config("image_folder", put(tmp_path, {"x.tar": tar_of(members)}))).class_names == (
        "bear",
        "wolf",
    )
    put(tmp_path, {"x.tar": tar_of({**members, "c.png": image})})
    with refused(str(tmp_path)) as caught:
        open_source(data_config("image_folder", tmp_path))
    assert "'c.png'" in caught.value.problems[0].reason


def test_shards_that_number_their_images_anew_hold_different_images(tmp_path, formats, data_config):
    shards = {
        f"{shard}.tar": tar_of(
            {f"{n}.png": formats.image(np.full((8, 8), 10 * shard + n, np.uint8)) for n in range(10)}
        )
        for shard in range(3)
    }
    source = open_source(data_config("image_folder", put(tmp_path, shards)))
    values = [int(image[0, 0, 0]) for split in source.splits.values() for image, _ in split.stream()]
    assert sorted(values) == list(range(30))


def test_a_bad_image_in_an_archive_is_named_or_skipped(tmp_path, members, data_config):
    broken = {**members, "cat/03.png": members["cat/03.png"][:30]}
    for name, pack in (("x.tar", tar_of), ("x.zip", zip_of)):
        root = put(tmp_path / name, {name: pack(broken)})
        source = open_source(data_config("image_folder", root))
        with refused(f"{root}/{name}:cat/03.png"):
            [list(split.stream()) for split in source.splits.values()]
        source = open_source(data_config("image_folder", root, on_bad_image="skip"))
        assert sum(len(list(split.stream())) for split in source.splits.values()) == 39
        assert [bad.name for bad in source.skipped] == [f"{root}/{name}:cat/03.png"]


def test_damage_to_a_zip_is_noticed_by_its_checksum(tmp_path, members, data_config):
    content = bytearray(zip_of(members, zipfile.ZIP_STORED))
    content[content.index(b"IDAT") + 5] ^= 1
    source = open_source(data_config("image_folder", put(tmp_path, {"x.zip": bytes(content)})))
    with pytest.raises(UserError) as caught:
        [list(split.stream()) for split in source.splits.values()]
    assert caught.value.problems[0].key.endswith("x.zip:cat/00.png")


def test_archives_that_cannot_be_used_are_named(tmp_path, members, data_config, formats):
    def refuse(files: dict[str, bytes], key: str) -> None:
        root = put(tmp_path / str(len(list(tmp_path.iterdir()))), files)
        with refused(key.format(root=root)):
            open_source(data_config("image_folder", root))

    refuse({"a.tar": tar_of({"notes.txt": b"x"})}, "{root}/a.tar")
    refuse({"a.tar": tar_of(members)[:1000]}, "{root}/a.tar")
    refuse({"a.zip": zip_of(members)[:-30]}, "{root}/a.zip")
    refuse({"a.tar": formats.tar(members)}, "{root}/a.tar")
    refuse({"a.tar.gz": formats.tar(members)}, "data.root")
    refuse({"a.tar": tar_of({"../x.png": b""})}, "{root}/a.tar")
    refuse({"a.zip": zip_of({"/x.png": b""})}, "{root}/a.zip")
    refuse({"a.tar": tar_of({"x.png": b"", "x.json": b"{"})}, "{root}/a.tar:x.json")


def test_a_bucket_without_images_or_keys_is_one_line(s3_root, data_config, monkeypatch):
    with refused("data.root") as caught:
        open_source(data_config("image_folder", s3_root))
    assert caught.value.problems[0].value == s3_root
    with refused("data.root", error=NotFound):
        open_source(data_config("image_folder", "s3://no-such-bucket-here/x"))
    put(s3_root, {"notes.txt": b"x"})
    with refused("data.root") as caught:
        open_source(data_config("image_folder", s3_root))
    assert "notes.txt" in caught.value.problems[0].reason
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    _s3_filesystem.cache_clear()
    with refused("data.root") as failure:
        open_source(data_config("image_folder", s3_root))
    assert "\n" not in str(failure.value)


def test_a_changed_object_changes_the_fingerprint(s3_root, members, data_config):
    data = data_config("image_folder", put(s3_root, members))
    first = source_fingerprint(data)
    assert source_fingerprint(data) == first
    put(s3_root, {"cat/new.png": b"x"})
    assert source_fingerprint(data) != first
    assert [file.path for file in list_files(s3_root)][20] == "cat/new.png"


def test_the_first_images_are_the_same_from_any_packing(tmp_path, members, data_config):
    read = []
    for root in (put(tmp_path / "a", members), put(tmp_path / "b", {"x.tar": tar_of(members)})):
        data = data_config("image_folder", root, max_images=7)
        read.append(read_split(write_dataset(open_source(data), root + "-store", name="x", data=data).uri, "train"))
    assert np.array_equal(read[0].images, read[1].images)
    assert len(read[0]) == 7
    assert set(read[0].labels) == {0, 1}
