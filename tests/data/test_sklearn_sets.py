"""The digits and photographs that come with scikit-learn."""

from __future__ import annotations

import numpy as np
from refused import refused
from sklearn.datasets import load_digits, load_sample_image

from ncsn.data.sources import open_source

PHOTOS = {"image_size": 32, "channels": 3, "test_fraction": 0.2}


def read(source, split):
    examples = list(source.splits[split].stream())
    assert len(examples) == len(source.splits[split])
    return np.stack([example.image for example in examples]), np.array([example.label for example in examples])


def test_every_digit_is_in_one_split_with_its_ink_to_the_gray_step(data_config):
    original = load_digits()
    source = open_source(data_config("sklearn_digits", test_fraction=0.3))
    (train, train_labels), (test, test_labels) = (read(source, split) for split in ("train", "test"))
    images, labels = np.concatenate([train, test]), np.concatenate([train_labels, test_labels])
    ink = [tuple(image.ravel()) for image in np.rint(images.astype(float) * 16 / 255).astype(int)]
    expected = [tuple(image.ravel()) for image in original.images.astype(int)]
    assert sorted(zip(ink, labels.tolist(), strict=True)) == sorted(
        zip(expected, original.target.tolist(), strict=True)
    )
    assert set(np.unique(images)) == {(255 * ink * 2 + 16) // 32 for ink in range(17)}
    assert (len(train), len(test)) == (1258, 539)
    assert np.abs(np.bincount(test_labels) / np.bincount(original.target) - 0.3).max() < 0.01
    assert read(open_source(data_config("sklearn_digits", image_size=16)), "test")[0].shape[1:] == (16, 16, 1)


def test_patches_are_the_pixels_of_the_photographs(data_config):
    photographs = [load_sample_image(f"{name}.jpg") for name in ("china", "flower")]
    source = open_source(data_config("sklearn_photos", **PHOTOS))
    assert source.class_names == ("china", "flower")
    for split, count in (("train", 300), ("test", 120)):
        first = source.splits[split].section(0, count)
        assert {patch.side for patch in first.patches} == {32, 64, 128}  # shuffled
        assert {patch.photograph for patch in first.patches} == {0, 1}
        for patch, (image, label, _) in zip(first.patches, first.stream(), strict=True):
            rows, columns = (slice(start, start + patch.side) for start in (patch.top, patch.left))
            pixels = photographs[label][rows, columns]
            assert (label, image.shape, image.dtype) == (patch.photograph, (32, 32, 3), np.uint8)
            assert np.abs(image.mean((0, 1)) - pixels.mean((0, 1))).max() < (1e-9 if patch.side == 32 else 1)
            assert patch.side != 32 or np.array_equal(image, pixels)


def test_patches_for_training_and_for_testing_share_no_pixel(data_config):
    """The strip has 0.2 * 640 = 128 columns, and starts at 0.5 and at 0.2 of the other 512."""
    source = open_source(data_config("sklearn_photos", **PHOTOS))
    strips = [slice(256, 384), slice(102, 230)]
    for split, per_side in (("train", [5750, 4554, 2660]), ("test", [1300, 828, 76])):
        patches = source.splits[split].patches
        assert len(set(patches)) == len(patches) == len(source.splits[split])
        assert [sum(patch.side == side for patch in patches) for side in (32, 64, 128)] == per_side
        covered = np.zeros((2, 427, 640), bool)
        for number, side, top, left in patches:
            assert 0 <= top <= 427 - side and 0 <= left <= 640 - side
            covered[number, top : top + side, left : left + side] = True
        for photograph, strip in zip(covered, strips, strict=True):
            inside = photograph[:, strip].copy()
            photograph[:, strip] = False
            assert (inside if split == "test" else photograph).mean() > 0.75
            assert not (photograph if split == "test" else inside).any()


def test_patches_are_the_same_each_time_and_fit_the_photographs(data_config):
    source, again = (open_source(data_config("sklearn_photos", max_images=400, **PHOTOS)) for _ in range(2))
    images, labels = read(source, "test")
    for found, expected in zip(read(again, "test"), (images, labels), strict=True):
        assert np.array_equal(found, expected)
    assert 0.4 < labels.mean() < 0.6
    large = open_source(data_config("sklearn_photos", **PHOTOS | {"image_size": 65}))
    assert {patch.side for split in large.splits.values() for patch in split.patches} == {65}
    for fraction, largest in ((0.2, 128), (0.01, 6), (0.9, 32)):
        settings = PHOTOS | {"image_size": max(8, largest + 1), "test_fraction": fraction}
        with refused("data.image_size") as caught:
            open_source(data_config("sklearn_photos", **settings))
        assert f"{largest} pixels" in caught.value.problems[0].reason
    gray = open_source(data_config("sklearn_photos", image_size=32, max_images=2))
    assert read(gray, "test")[0].shape == (2, 32, 32, 1)
