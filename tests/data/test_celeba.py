"""CelebA from a zip that the tests make."""

from __future__ import annotations

import numpy as np
import pytest
from refused import refused

from ncsn.data.sources import open_source
from ncsn.errors import NotFound

NAMES = [f"img_align_celeba/{number:06d}.jpg" for number in range(1, 9)]


@pytest.fixture
def celeba(tmp_path, formats):
    """Writes the archive: image i is the constant 20 i in its centre and white outside of it."""

    def make(**replaced: bytes):
        members = {"img_align_celeba/": b""}
        for number, name in enumerate(NAMES, start=1):
            image = np.full((218, 178, 3), 255, np.uint8)
            image[39:179, 19:159] = 20 * number
            members[name] = formats.image(image)  # pixels exact; the decoder looks at the content
        members |= {NAMES[int(key.removeprefix("image_")) - 1]: value for key, value in replaced.items()}
        members["__MACOSX/img_align_celeba/._000001.jpg"] = b"not an image"
        path = tmp_path / "img_align_celeba.zip"
        path.write_bytes(formats.zip(members))
        return path

    return make


def constants(source, split):
    examples = list(source.splits[split].stream())
    assert all(example.image.shape == (16, 16, 3) and np.ptp(example.image) == 0 for example in examples)
    return [int(example.image[0, 0, 0]) // 20 for example in examples]


def test_the_paper_crop_is_cut_and_a_share_held_out(celeba, data_config):
    for root in (celeba(), celeba().parent):
        source = open_source(data_config("celeba", root, image_size=16, channels=3))
        train, test = constants(source, "train"), constants(source, "test")
        assert len(test) == 2
        assert sorted(train + test) == [1, 2, 3, 4, 5, 6, 7, 8]
        assert source.class_names == ()


def test_the_official_partition_is_used_when_it_is_there(celeba, data_config):
    root = celeba().parent
    split_of = {1: 0, 2: 2, 3: 1, 4: 0, 5: 0, 6: 2, 7: 1, 8: 0}
    lines = [f"{number:06d}.jpg {split}" for number, split in split_of.items()]
    (root / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    source = open_source(data_config("celeba", root, image_size=16, channels=3))
    assert constants(source, "train") == [1, 4, 5, 8]
    assert constants(source, "test") == [2, 6]


def test_a_partition_that_does_not_fit_is_refused(celeba, data_config):
    partition = celeba().with_name("list_eval_partition.txt")
    partition.write_text("000001.jpg 0\n")
    with refused(str(partition)) as caught:
        open_source(data_config("celeba", partition.parent, image_size=16, channels=3))
    assert "000002.jpg" in caught.value.problems[0].reason
    partition.write_text("000001.jpg train\n")
    with refused(f"{partition}:1") as caught:
        open_source(data_config("celeba", partition.parent, image_size=16, channels=3))
    assert caught.value.problems[0].value == "000001.jpg train"


def test_a_bad_image_is_named_or_skipped(celeba, data_config):
    root = celeba(image_3=b"\xff\xd8\xff cut").parent
    with refused(f"{root}/img_align_celeba.zip:img_align_celeba/000003.jpg"):
        read_all(open_source(data_config("celeba", root, image_size=16, channels=3)))
    source = open_source(data_config("celeba", root, image_size=16, channels=3, on_bad_image="skip"))
    assert sorted(constants(source, "train") + constants(source, "test")) == [1, 2, 4, 5, 6, 7, 8]
    assert [image.name.rpartition("/")[2] for image in source.skipped] == ["000003.jpg"]


def test_damage_to_a_stored_image_is_noticed(celeba, data_config):
    path = celeba()
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 1
    path.write_bytes(content)
    with refused(f"{path}:img_align_celeba/000001.jpg"):
        read_all(open_source(data_config("celeba", path, image_size=16, channels=3)))


def read_all(source):
    return [constants(source, split) for split in source.splits]


def test_broken_and_foreign_archives_are_refused(tmp_path, formats, data_config, celeba):
    config = data_config("celeba", tmp_path, image_size=16, channels=3)
    with refused("data.root", error=NotFound):
        open_source(config)
    path = celeba()
    path.write_bytes(path.read_bytes()[:-100])
    with refused(str(path)):
        open_source(config)
    path.write_bytes(formats.zip({"readme.txt": b""}))
    with refused(str(path)):
        open_source(config)
    path.write_bytes(formats.zip({"../000001.jpg": b""}))
    with refused(str(path)):
        open_source(config)


def test_gray_faces_are_refused(celeba, formats, data_config):
    path = celeba(image_2=formats.image(np.zeros((218, 178), np.uint8)))
    with refused("data.channels") as caught:
        read_all(open_source(data_config("celeba", path, image_size=16, channels=3)))
    assert "000002.jpg" in caught.value.problems[0].reason
