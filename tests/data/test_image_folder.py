"""Folders of PNG and JPEG images."""

from __future__ import annotations

import numpy as np
import pytest
from refused import refused

from ncsn.data.sources import open_source
from ncsn.errors import NotFound, UserError


@pytest.fixture
def folder(tmp_path, formats):
    """Writes constant images of different sizes, path -> gray value."""

    def make(values: dict[str, int], *, rgb: bool = False):
        for number, (path, value) in enumerate(values.items()):
            target = tmp_path / "images" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            image = np.full((9 + number, 12, 3) if rgb else (9 + number, 12), value, np.uint8)
            target.write_bytes(formats.image(image, "PNG" if path.lower().endswith("png") else "JPEG"))
        return tmp_path / "images"

    return make


def read_all(source):
    return {
        split: {(int(image.mean().round()), label) for image, label in part.stream()}
        for split, part in source.splits.items()
    }


def test_a_flat_folder_has_no_labels(folder, data_config):
    root = folder({f"{number}.png": 10 * number for number in range(8)})
    source = open_source(data_config("image_folder", root))
    read = read_all(source)
    assert read["train"] | read["test"] == {(10 * number, -1) for number in range(8)}
    assert (len(read["train"]), len(read["test"])) == (6, 2)
    assert source.class_names == ()


def test_sub_folders_are_classes_held_out_class_by_class(folder, data_config):
    root = folder(
        {f"{name}/deep/{number}.png": value + number for name, value in (("b", 100), ("a", 0)) for number in range(8)}
    )
    source = open_source(data_config("image_folder", root))
    assert source.class_names == ("a", "b")
    read = read_all(source)
    assert read["train"] | read["test"] == {(100 * label + number, label) for label in (0, 1) for number in range(8)}
    assert sorted(label for _, label in read["test"]) == [0, 0, 1, 1]


def test_folders_train_and_test_are_the_splits(folder, data_config):
    paths = {"train/cat/1.png": 10, "train/dog/2.png": 20, "train/dog/3.png": 30, "test/dog/4.png": 40}
    source = open_source(data_config("image_folder", folder(paths)))
    assert source.class_names == ("cat", "dog")
    assert read_all(source) == {"train": {(10, 0), (20, 1), (30, 1)}, "test": {(40, 1)}}


def test_every_suffix_counts_and_other_files_do_not(folder, data_config):
    root = folder({"a.PNG": 1, "b.jpg": 2, "c.JPEG": 3, "d.png": 4})
    (root / "notes.txt").write_text("not an image")
    (root / ".hidden.png").write_bytes(b"not an image")
    (root / ".cache").mkdir()
    (root / ".cache" / "x.png").write_bytes(b"not an image")
    source = open_source(data_config("image_folder", root))
    assert sum(split.count for split in source.splits.values()) == 4
    read_all(source)


def test_the_order_is_fixed_shuffled_and_independent_of_where_the_folder_is(folder, data_config, tmp_path):
    root = folder({f"{name}/{number}.png": number for name in "ab" for number in range(20)})
    first = [
        int(image[0, 0, 0]) for image, _ in open_source(data_config("image_folder", root)).splits["train"].stream()
    ]
    moved = root.rename(tmp_path / "moved")
    source = open_source(data_config("image_folder", moved))
    assert [int(image[0, 0, 0]) for image, _ in source.splits["train"].stream()] == first
    labels = [label for _, label in source.splits["train"].stream()]
    assert labels != sorted(labels)


def test_images_are_cut_square_and_resized(folder, formats, data_config):
    root = folder({"0.png": 0, "1.png": 0})
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 200
    for path in root.iterdir():
        path.write_bytes(formats.image(wide))
    source = open_source(data_config("image_folder", root, channels=3, image_size=16))
    assert all((image == 200).all() and image.shape == (16, 16, 3) for image, _ in source.splits["train"].stream())


def test_rgb_is_refused_as_gray_by_name_or_converted(folder, data_config):
    root = folder({f"{number}.png": 50 for number in range(4)}, rgb=True)
    with refused("data.channels") as caught:
        read_all(open_source(data_config("image_folder", root)))
    assert f"{root}/" in caught.value.problems[0].reason
    assert read_all(open_source(data_config("image_folder", root, convert_channels=True)))["train"] == {(50, -1)}


def test_a_wrong_channel_count_is_not_skipped(folder, formats, data_config):
    root = folder({f"{number}.png": 50 for number in range(4)})
    (root / "2.png").write_bytes(formats.image(np.zeros((9, 9, 3), np.uint8)))
    with refused("data.channels") as caught:
        read_all(open_source(data_config("image_folder", root, on_bad_image="skip")))
    assert "2.png" in caught.value.problems[0].reason


def test_a_bad_image_is_named_or_skipped(folder, data_config):
    root = folder({f"{number}.png": number for number in range(12)})
    (root / "7.png").write_bytes((root / "7.png").read_bytes()[:40])
    (root / "9.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        read_all(open_source(data_config("image_folder", root)))
    assert caught.value.problems[0].key in (f"{root}/7.png", f"{root}/9.png")
    source = open_source(data_config("image_folder", root, on_bad_image="skip"))
    read = read_all(source)
    assert {value for value, _ in read["train"] | read["test"]} == set(range(12)) - {7, 9}
    assert sorted(image.name for image in source.skipped) == [str(root / "7.png"), str(root / "9.png")]


def test_many_images_decode_in_order_on_several_threads(folder, data_config, monkeypatch):
    root = folder({f"{number}.png": number for number in range(100)})
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    alone = [
        int(image[0, 0, 0]) for image, _ in open_source(data_config("image_folder", root)).splits["train"].stream()
    ]
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    together = [int(i[0, 0, 0]) for i, _ in open_source(data_config("image_folder", root)).splits["train"].stream()]
    assert together == alone
    assert len(set(alone)) == 75


def test_images_beside_class_folders_are_refused(folder, data_config):
    root = folder({"cat/1.png": 1, "cat/2.png": 2, "3.png": 3})
    with refused(str(root)) as caught:
        open_source(data_config("image_folder", root))
    assert "'cat'" in caught.value.problems[0].reason and "'3.png'" in caught.value.problems[0].reason


def test_a_folder_without_images_is_refused(tmp_path, data_config):
    with refused("data.root"):
        open_source(data_config("image_folder", tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "movie.mp4").write_text("x")
    with refused("data.root") as caught:
        open_source(data_config("image_folder", tmp_path))
    assert "movie.mp4" in caught.value.problems[0].reason


@pytest.mark.parametrize("source", ["image_folder", "cifar10", "celeba", "mnist", "fashion_mnist"])
def test_no_root_and_a_missing_root_are_refused(tmp_path, data_config, source):
    with refused("data.root"):
        open_source(data_config(source))
    with refused("data.root", error=NotFound) as caught:
        open_source(data_config(source, tmp_path / "nowhere"))
    assert caught.value.problems[0].value == str(tmp_path / "nowhere")


def test_a_file_is_not_a_folder(tmp_path, data_config):
    (tmp_path / "a.png").write_bytes(b"")
    with refused("data.root"):
        open_source(data_config("image_folder", tmp_path / "a.png"))
