"""Images in folders, archives and buckets with their labels: the same rows however packed, mistakes by name. CelebA."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from image_folders import Formats, put, rows_of, skipped_of, sorted_rows
from refused import refused

from ncsn.data.dataset import write_dataset
from ncsn.data.sources import open_source
from ncsn.data.sources.base import list_files, source_fingerprint
from ncsn.errors import NotFound, UserError
from ncsn.storage import s3


def halves(members: dict[str, bytes]) -> list[dict[str, bytes]]:
    return [dict(list(members.items())[start::2]) for start in (0, 1)]


def pictures(values: dict[str, int]) -> dict[str, bytes]:
    """Images of one value and different sizes."""
    sized = enumerate(values.items(), start=9)
    return {path: Formats.image(np.full((height, 12), value, np.uint8)) for height, (path, value) in sized}


def test_folders_are_classes_held_out_class_by_class_and_left_out_by_name(tmp_path, data_config):
    values = {f"{name}/deep/{n}.png": 10 * place + n for place, name in enumerate("abc") for n in range(8)}
    root = put(tmp_path, pictures(values))
    source = open_source(data_config("image_folder", root))
    assert source.class_names == ("a", "b", "c")
    assert sorted_rows(source) == [(10 * label + n, label) for label in range(3) for n in range(8)]
    assert sorted(label for _, label in rows_of(source)["test"]) == [0, 0, 1, 1, 2, 2]
    source = open_source(data_config("image_folder", root, leave_out=["b"]))
    assert source.class_names == ("a", "c")
    assert sorted_rows(source) == [(20 * label + n, label) for label in range(2) for n in range(8)]
    for names in (["d"], ["a", "b", "c"]):
        with refused("data.leave_out"):
            open_source(data_config("image_folder", root, leave_out=names))


def test_folders_train_and_test_are_the_splits(members, tmp_path, data_config):
    paths = {"train/cat/1.png": 10, "train/dog/2.png": 20, "train/dog/3.png": 30, "test/dog/4.png": 40}
    source = open_source(data_config("image_folder", put(tmp_path / "images", pictures(paths))))
    assert source.class_names == ("cat", "dog")
    rows = rows_of(source)
    assert (sorted(rows["train"]), rows["test"]) == ([(10, 0), (20, 1), (30, 1)], [(40, 1)])
    one, other = halves(members)
    root = put(tmp_path / "shards", {"train/0.tar": Formats.tar(one), "test/0.tar": Formats.tar(other)})
    rows = rows_of(open_source(data_config("image_folder", root)))
    assert sorted(rows["train"]) == sorted((20 * n + c, c) for n in range(10) for c in (0, 1))
    assert len(rows["test"]) == 20


def test_however_images_are_packed_they_are_the_same_dataset(tmp_path, s3_root, members, data_config):
    def digest_of(root: str, **settings) -> str:
        data = data_config("image_folder", root, **settings)
        return write_dataset(open_source(data), str(tmp_path / "store"), name="x", data=data).manifest.digest

    one, other = halves(members)
    roots = [
        put(tmp_path / "folder", members),
        put(tmp_path / "tar", {"images.tar": Formats.tar(members)}),
        put(tmp_path / "zip", {"images.zip": Formats.zip(members)}),
        put(tmp_path / "stored", {"images.ZIP": Formats.zip(members, zipfile.ZIP_STORED)}),
        put(tmp_path / "shards", {"0.tar": Formats.tar(one), "1.tar": Formats.tar(other)}),
        put(tmp_path / "both", {"a.tar": Formats.tar(other), "b.zip": Formats.zip(one)}),
        str(tmp_path / "tar" / "images.tar"),
        put(f"{s3_root}/folder", members),
        put(f"{s3_root}/shards", {"0.tar": Formats.tar(one), "1.zip": Formats.zip(other)}),
    ]
    assert len({digest_of(root) for root in roots}) == 1
    assert digest_of(roots[0]) != digest_of(put(tmp_path / "fewer", one))
    assert len({digest_of(root, max_images=7) for root in (roots[0], roots[1], roots[-1])}) == 1


@pytest.mark.parametrize("kind", ["cls", "json"])
def test_labels_next_to_the_images_are_the_classes(tmp_path, data_config, kind):
    members = {}
    for number in range(240):  # several times what is read of an archive at once
        label = str(number % 3) if kind == "cls" else json.dumps({"label": number % 3})
        members[f"{number:04d}.png"] = Formats.image(np.full((8, 8), number, np.uint8))
        members[f"{number:04d}.{kind}"] = label.encode()
    source = open_source(data_config("image_folder", put(tmp_path, {"shard.tar": Formats.tar(members)})))
    assert sorted_rows(source) == [(number, number % 3) for number in range(240)]
    assert source.class_names == ("0", "1", "2")


def test_shards_that_repeat_names_hold_different_images_without_labels(tmp_path, data_config):
    images = [Formats.image(np.full((8, 8), n, np.uint8)) for n in range(30)]
    shards = {f"{n}.tar": Formats.tar({f"{k}.png": images[10 * n + k] for k in range(10)}) for n in range(3)}
    source = open_source(data_config("image_folder", put(tmp_path, shards)))
    assert source.class_names == () and sorted_rows(source) == [(n, -1) for n in range(30)]


@pytest.mark.parametrize("pack", [None, "tar", "zip"])
def test_bad_images_are_named_and_the_others_stay(tmp_path, members, data_config, pack):
    files = {**members, "cat/03.png": members["cat/03.png"][:30], "dog/07.png": b""}
    root = put(tmp_path, files if pack is None else {f"x.{pack}": getattr(Formats, pack)(files)})
    source = open_source(data_config("image_folder", root))
    inside = "/" if pack is None else f"/x.{pack}:"
    assert sorted(skipped_of(source)) == [f"{root}{inside}{name}" for name in ("cat/03.png", "dog/07.png")]
    assert sum(map(len, rows_of(source).values())) == 38


def test_roots_that_cannot_be_used_are_named(tmp_path, members, data_config):
    def refuse(files: dict[str, bytes], key: str, *, error: type[UserError] = UserError, below: str = "") -> None:
        root = put(tmp_path / str(len(list(tmp_path.iterdir()))), files)
        with refused(key.format(root=root), error=error):
            open_source(data_config("image_folder", f"{root}{below}"))

    refuse({"a.tar": Formats.tar({"notes.txt": b"x"})}, "data.root")
    refuse({"a.tar": Formats.tar(members)[:1000]}, "{root}/a.tar")
    refuse({"a.zip": Formats.zip(members)[:-30]}, "{root}/a.zip")
    refuse({"a.tar": Formats.tar(members, "w:gz")}, "{root}/a.tar")
    refuse({"a.tgz": Formats.tar(members, "w:gz")}, "data.root", below="/a.tgz")
    refuse({"a.tar": Formats.tar({"x.png": b"", "x.json": b"{"})}, "{root}/a.tar:x.json")
    refuse({"notes.txt": b"x"}, "data.root")
    refuse({"a.png": b""}, "data.root", below="/a.png")
    refuse({}, "data.root", error=NotFound, below="/nowhere")


def test_a_bucket_without_images_or_keys_is_one_line(s3_root, data_config, monkeypatch):
    put(s3_root, {"notes.txt": b"x"})
    for root in (s3_root, "s3://no-such-bucket-here/x"):
        with refused("data.root"):
            open_source(data_config("image_folder", root))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3.bucket_filesystem.cache_clear()
    with refused("data.root"):
        open_source(data_config("image_folder", s3_root))


def test_a_changed_object_changes_the_fingerprint(s3_root, members, data_config):
    data = data_config("image_folder", put(s3_root, members))
    first = source_fingerprint(data)
    assert source_fingerprint(data) == first
    put(s3_root, {"cat/new.png": b"x"})
    assert source_fingerprint(data) != first
    assert list_files(data)[20].as_py() == "cat/new.png"


COUNT = 12


@pytest.fixture
def images() -> dict[str, bytes]:
    """Path -> PNG of gray value n, in folders that are not classes."""
    return {f"{n % 2:05d}/img{n:08d}.png": Formats.image(np.full((8, 8), n, np.uint8)) for n in range(COUNT)}


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


KINDS = ("metadata.jsonl", "metadata.csv", "dataset.json", "labels.csv")


@pytest.mark.parametrize("pack", [None, "tar", "zip", "outside"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_table_labels_images_however_they_are_packed(tmp_path, images, data_config, kind, pack):
    table = {kind: table_of(kind, {name: number % 3 for number, name in enumerate(images)})}
    files = {**images, **table}
    if pack == "outside":
        files = {"x.zip": Formats.zip(images), **table}
    elif pack:
        files = {f"x.{pack}": getattr(Formats, pack)(files)}
    source = open_source(data_config("image_folder", put(tmp_path, files)))
    assert source.class_names == ("0", "1", "2")
    assert sorted_rows(source) == [(number, number % 3) for number in range(COUNT)]


def test_a_table_in_a_folder_names_images_from_there(tmp_path, data_config):
    files = {}
    for split, count in (("train", 6), ("test", 4)):
        names = {f"{number}.png": ("猫", "dog")[number % 2] for number in range(count)}
        files |= {f"{split}/{name}": Formats.image(np.full((8, 8), n, np.uint8)) for n, name in enumerate(names)}
        files[f"{split}/metadata.jsonl"] = table_of("metadata.jsonl", names)
    source = open_source(data_config("image_folder", put(tmp_path / "folder", files)))
    assert source.class_names == ("dog", "猫")
    assert sorted(rows_of(source)["test"]) == [(n, (n + 1) % 2) for n in range(4)]
    shards = {f"{n}.tar": Formats.tar({"./1.png": files["test/1.png"], "labels.csv": b"file,label\n1.png,%d" % n})
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


def test_broken_tables_and_those_that_do_not_fit_their_images_are_named(tmp_path, images, data_config):
    labels, name = dict.fromkeys(images, 1), next(iter(images))
    wrong = [
        *(("labels.csv", table_of("labels.csv", labels | {other: 0})) for other in ("00000/absent.png", "../up.png")),
        *((kind, table_of(kind, labels).replace(b"img00000002", b"img00000000")) for kind in KINDS),  # twice
        ("labels.csv", b"\xff"),
        ("labels.csv", b'file,label\n"open,1'),
        ("dataset.json", b'{"labels": ['),
        ("metadata.jsonl", json.dumps({"file_name": name, "label": {"a": 1}}).encode()),
    ]
    for number, (kind, content) in enumerate(wrong):
        root = put(tmp_path / str(number), {**images, kind: content})
        with refused(f"{root}/{kind}"):
            open_source(data_config("image_folder", root))
    both = {kind: table_of(kind, {name: 1}) for kind in ("labels.csv", "metadata.csv")}
    root = put(tmp_path / "both", {**images, **both})
    with refused(f"{root}/metadata.csv"):
        open_source(data_config("image_folder", root))


@pytest.mark.parametrize("missing", ["", "-1", None])
def test_images_without_a_label_beside_others_are_kept_and_counted(tmp_path, images, data_config, missing):
    words = [missing] * 4 + ["cat", "dog"] * 4
    labels = {name: word for name, word in zip(images, words, strict=True) if word is not None}
    root = put(tmp_path / "images", {**images, "labels.csv": table_of("labels.csv", labels)})
    data = data_config("image_folder", root)
    source = open_source(data)
    assert source.class_names == ("cat", "dog")
    assert sorted_rows(source) == [(n, -1 if n < 4 else n % 2) for n in range(COUNT)]
    assert [label for _, label in rows_of(source)["test"]].count(-1) == 1  # they give their share as a class does
    assert write_dataset(source, str(tmp_path / "store"), name="x", data=data).manifest.unlabeled == 4


def test_faces_are_cut_as_in_the_paper_and_split_as_their_partition_says(tmp_path, data_config):
    members = {"img_align_celeba/": b"", "__MACOSX/img_align_celeba/._000001.jpg": b"not an image"}
    for number in range(1, 9):
        image = np.full((218, 178, 3), 255, np.uint8)
        image[39:179, 19:159] = 20 * number
        members[f"img_align_celeba/{number:06d}.jpg"] = Formats.image(image)  # the decoder looks at the content
    archive, partition = tmp_path / "img_align_celeba.zip", tmp_path / "list_eval_partition.txt"
    archive.write_bytes(Formats.zip(members, zipfile.ZIP_STORED))

    def faces(root: Path) -> dict[str, list[int]]:
        """Split -> the numbers of its images."""
        source = open_source(data_config("celeba", root, image_size=16, channels=3))
        for row in source.splits["train"].stream():
            assert row.image.shape == (16, 16, 3) and np.ptp(row.image) == 0
        return {split: [value // 20 for value, _ in rows] for split, rows in rows_of(source).items()}

    for root in (archive, tmp_path):
        held_out = faces(root)
        assert len(held_out["test"]) == 2 and sorted(held_out["train"] + held_out["test"]) == [*range(1, 9)]
    partition.write_text("".join(f"{n:06d}.jpg {split}\n" for n, split in enumerate([0, 2, 1, 0, 0, 2, 1, 0], start=1)))
    assert faces(archive) == {"train": [1, 4, 5, 8], "test": [2, 6]}
    wrong = [(partition, b"000001.jpg 0\n"), (partition, b"000001.jpg train\n")]
    wrong += [(archive, archive.read_bytes()[:-100]), (archive, Formats.zip({"readme.txt": b""}))]
    for file, content in wrong:
        file.write_bytes(content)
        with refused(str(file)):
            faces(archive)


def test_damage_to_a_zip_is_noticed_by_its_checksum(tmp_path, members, data_config):
    content = bytearray(Formats.zip(members, zipfile.ZIP_STORED))
    content[content.index(b"IDAT") + 5] ^= 1
    source = open_source(data_config("image_folder", put(tmp_path, {"x.zip": bytes(content)})))
    assert skipped_of(source) == [f"{tmp_path}/x.zip:cat/00.png"]
