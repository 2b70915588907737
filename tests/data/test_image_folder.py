"""Images in folders, archives and buckets with their labels: the same rows however packed, mistakes by name. CelebA."""

from __future__ import annotations

import json
import zipfile
from contextlib import nullcontext

import numpy as np
import pytest
from image_folders import put, rows_of, skipped_of, sorted_rows
from refused import refused
from tiny_networks import tiny_config

from ncsn.data.dataset import write_dataset
from ncsn.data.format import SkippedImage
from ncsn.data.sources import open_source
from ncsn.data.sources.base import list_files, source_fingerprint
from ncsn.errors import NotFound, UserError
from ncsn.steps import train
from ncsn.storage import s3


def halves(members: dict[str, bytes]) -> list[dict[str, bytes]]:
    names = list(members)
    return [{name: members[name] for name in names[start::2]} for start in (0, 1)]


@pytest.fixture
def folder(tmp_path, formats):
    """Writes images of one value and different sizes, path -> value."""

    def make(values: dict[str, int]) -> str:
        sized = enumerate(values.items(), start=9)
        files = {path: formats.image(np.full((height, 12), value, np.uint8)) for height, (path, value) in sized}
        return put(tmp_path / "images", files)

    return make


@pytest.fixture
def digest_of(tmp_path, data_config):
    def digest(root: str, **settings) -> str:
        data = data_config("image_folder", root, **settings)
        return write_dataset(open_source(data), str(tmp_path / "store"), name="x", data=data).manifest.digest

    return digest


def test_folders_are_classes_held_out_class_by_class(folder, data_config):
    root = folder(
        {f"{name}/deep/{number}.png": value + number for name, value in (("b", 100), ("a", 0)) for number in range(8)}
    )
    source = open_source(data_config("image_folder", root))
    assert source.class_names == ("a", "b")
    rows = rows_of(source)
    assert sorted(rows["train"] + rows["test"]) == [(100 * label + k, label) for label in (0, 1) for k in range(8)]
    assert sorted(label for _, label in rows["test"]) == [0, 0, 1, 1]


def test_classes_are_left_out_by_name(folder, data_config):
    root = folder({f"{name}/{number}.png": number for name in "abc" for number in range(8)})
    source = open_source(data_config("image_folder", root, leave_out=["b"]))
    assert source.class_names == ("a", "c")
    assert sorted_rows(source) == sorted([(k, label) for label in (0, 1) for k in range(8)])
    for names in (["d"], ["a", "b", "c"]):
        with refused("data.leave_out"):
            open_source(data_config("image_folder", root, leave_out=names))


def test_folders_train_and_test_are_the_splits(folder, members, tmp_path, data_config, formats):
    paths = {"train/cat/1.png": 10, "train/dog/2.png": 20, "train/dog/3.png": 30, "test/dog/4.png": 40}
    source = open_source(data_config("image_folder", folder(paths)))
    assert source.class_names == ("cat", "dog")
    rows = rows_of(source)
    assert (sorted(rows["train"]), rows["test"]) == ([(10, 0), (20, 1), (30, 1)], [(40, 1)])
    one, other = halves(members)
    root = put(tmp_path / "shards", {"train/0.tar": formats.tar(one), "test/0.tar": formats.tar(other)})
    source = open_source(data_config("image_folder", root))
    assert source.class_names == ("cat", "dog")
    assert sorted(rows_of(source)["train"]) == sorted((20 * n + c, c) for n in range(10) for c in (0, 1))
    assert len(rows_of(source)["test"]) == 20


def test_however_images_are_packed_they_are_the_same_dataset(tmp_path, s3_root, members, digest_of, formats):
    one, other = halves(members)
    roots = [
        put(tmp_path / "folder", members),
        put(tmp_path / "tar", {"images.tar": formats.tar(members)}),
        put(tmp_path / "zip", {"images.zip": formats.zip(members)}),
        put(tmp_path / "stored", {"images.ZIP": formats.zip(members, zipfile.ZIP_STORED)}),
        put(tmp_path / "shards", {"0.tar": formats.tar(one), "1.tar": formats.tar(other)}),
        put(tmp_path / "both", {"a.tar": formats.tar(other), "b.zip": formats.zip(one)}),
        str(tmp_path / "tar" / "images.tar"),
        put(f"{s3_root}/folder", members),
        put(f"{s3_root}/shards", {"0.tar": formats.tar(one), "1.zip": formats.zip(other)}),
    ]
    assert len({digest_of(root) for root in roots}) == 1
    assert digest_of(roots[0]) != digest_of(put(tmp_path / "fewer", one))
    assert len({digest_of(root, max_images=7) for root in (roots[0], roots[1], roots[-1])}) == 1


@pytest.mark.parametrize("kind", ["cls", "json"])
def test_labels_next_to_the_images_are_the_classes(tmp_path, formats, data_config, kind):
    members = {}
    count = 240  # several times what is read of an archive at once
    for number in range(count):
        label = str(number % 3) if kind == "cls" else json.dumps({"label": number % 3})
        members[f"{number:04d}.png"] = formats.image(np.full((8, 8), number, np.uint8))
        members[f"{number:04d}.{kind}"] = label.encode()
    source = open_source(data_config("image_folder", put(tmp_path, {"shard.tar": formats.tar(members)})))
    assert sorted_rows(source) == [(number, number % 3) for number in range(count)]
    assert source.class_names == ("0", "1", "2")


def test_shards_that_repeat_names_hold_different_images(tmp_path, formats, data_config):
    shards = {
        f"{shard}.tar": formats.tar(
            {f"{n}.png": formats.image(np.full((8, 8), 10 * shard + n, np.uint8)) for n in range(10)}
        )
        for shard in range(3)
    }
    rows = sorted_rows(open_source(data_config("image_folder", put(tmp_path, shards))))
    assert [value for value, _ in rows] == list(range(30))


@pytest.mark.parametrize("pack", [None, "tar", "zip"])
def test_bad_images_are_named_and_the_others_stay(tmp_path, members, data_config, formats, pack):
    files = {**members, "cat/03.png": members["cat/03.png"][:30], "dog/07.png": b""}
    root = put(tmp_path, files if pack is None else {f"x.{pack}": getattr(formats, pack)(files)})
    source = open_source(data_config("image_folder", root))
    inside = "/" if pack is None else f"/x.{pack}:"
    assert sorted(skipped_of(source)) == [f"{root}{inside}{name}" for name in ("cat/03.png", "dog/07.png")]
    assert sum(map(len, rows_of(source).values())) == 38


def test_roots_that_cannot_be_used_are_named(tmp_path, members, data_config, formats):
    def refuse(files: dict[str, bytes], key: str, *, error: type[UserError] = UserError, below: str = "") -> None:
        root = put(tmp_path / str(len(list(tmp_path.iterdir()))), files)
        with refused(key.format(root=root), error=error):
            open_source(data_config("image_folder", f"{root}{below}"))

    refuse({"a.tar": formats.tar({"notes.txt": b"x"})}, "data.root")
    refuse({"a.tar": formats.tar(members)[:1000]}, "{root}/a.tar")
    refuse({"a.zip": formats.zip(members)[:-30]}, "{root}/a.zip")
    refuse({"a.tar": formats.tar(members, "w:gz")}, "{root}/a.tar")
    refuse({"a.tar.gz": formats.tar(members, "w:gz")}, "data.root")
    refuse({"a.tgz": formats.tar(members, "w:gz")}, "data.root", below="/a.tgz")
    refuse({"a.tar": formats.tar({"x.png": b"", "x.json": b"{"})}, "{root}/a.tar:x.json")
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
    assert list_files(s3_root)[20].as_py() == "cat/new.png"


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


@pytest.mark.parametrize(("count", "names"), [(1, ("00000", "00001")), (COUNT // 2, ("odd",))])
def test_a_table_of_a_few_images_does_not_hide_folders(tmp_path, images, data_config, count, names):
    stray = table_of("labels.csv", dict.fromkeys(list(images)[:count], "odd"))
    source = open_source(data_config("image_folder", put(tmp_path, {**images, "labels.csv": stray})))
    assert source.class_names == names
    assert source.ignored == ({"stray label": 1} if count == 1 else {})


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
def test_training_is_refused_where_the_classifier_would_be(tmp_path, members, data_config, classes):
    files = {f"{n % classes}/{n}.png" if classes else f"{n}.png": image for n, image in enumerate(members.values())}
    data = data_config("image_folder", put(tmp_path / "images", files))
    manifest = write_dataset(open_source(data), str(tmp_path / "store"), name="x", data=data).manifest
    with nullcontext() if classes > 1 else refused("evaluation.extractor"):
        train.require_classes(tiny_config("evaluation.extractor=classifier"), manifest, "the dataset")


FACES = [f"img_align_celeba/{number:06d}.jpg" for number in range(1, 9)]


@pytest.fixture
def celeba(tmp_path, formats, data_config):
    """Writes the archive, image i of which is 20 i in its center and white around it; gives its path and a config."""

    members = {"img_align_celeba/": b""}
    for number, name in enumerate(FACES, start=1):
        image = np.full((218, 178, 3), 255, np.uint8)
        image[39:179, 19:159] = 20 * number
        members[name] = formats.image(image)  # pixels exact; the decoder looks at the content
    members["__MACOSX/img_align_celeba/._000001.jpg"] = b"not an image"
    path = tmp_path / "img_align_celeba.zip"
    path.write_bytes(formats.zip(members, zipfile.ZIP_STORED))
    return path, data_config("celeba", path, image_size=16, channels=3)


def faces(source) -> dict[str, list[int]]:
    """Split -> the numbers of its images."""
    found = {}
    for split, part in source.splits.items():
        images = [row.image for row in part.stream() if not isinstance(row, SkippedImage)]
        assert all(image.shape == (16, 16, 3) and np.ptp(image) == 0 for image in images)
        found[split] = [int(image[0, 0, 0]) // 20 for image in images]
    return found


def test_the_paper_crop_is_cut_and_a_share_held_out(celeba, data_config):
    path, config = celeba
    for data in (config, data_config("celeba", path.parent, image_size=16, channels=3)):
        source = open_source(data)
        found = faces(source)
        assert len(found["test"]) == 2
        assert sorted(found["train"] + found["test"]) == [1, 2, 3, 4, 5, 6, 7, 8]
        assert source.class_names == ()


def test_the_official_partition_is_used_when_it_is_there(celeba):
    path, config = celeba
    partition = path.with_name("list_eval_partition.txt")
    split_of = {1: 0, 2: 2, 3: 1, 4: 0, 5: 0, 6: 2, 7: 1, 8: 0}
    partition.write_text("".join(f"{number:06d}.jpg {split}\n" for number, split in split_of.items()))
    assert faces(open_source(config)) == {"train": [1, 4, 5, 8], "test": [2, 6]}
    for wrong in ("000001.jpg 0\n", "000001.jpg train\n"):
        partition.write_text(wrong)
        with refused(str(partition)):
            open_source(config)


def test_broken_and_foreign_archives_are_refused(formats, celeba):
    path, config = celeba
    for content in (path.read_bytes()[:-100], formats.zip({"readme.txt": b""})):
        path.write_bytes(content)
        with refused(str(path)):
            open_source(config)


def test_a_flat_folder_has_no_labels(folder, data_config):
    source = open_source(data_config("image_folder", folder({f"{number}.png": 10 * number for number in range(8)})))
    rows = rows_of(source)
    assert sorted(rows["train"] + rows["test"]) == [(10 * number, -1) for number in range(8)]
    assert (len(rows["train"]), len(rows["test"])) == (6, 2)
    assert source.class_names == ()


def test_damage_to_a_zip_is_noticed_by_its_checksum(tmp_path, members, data_config, formats):
    content = bytearray(formats.zip(members, zipfile.ZIP_STORED))
    content[content.index(b"IDAT") + 5] ^= 1
    source = open_source(data_config("image_folder", put(tmp_path, {"x.zip": bytes(content)})))
    assert skipped_of(source) == [f"{tmp_path}/x.zip:cat/00.png"]
