"""scikit-learn's digits against the package's own arrays."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ncsn.data.sources import open_source


@pytest.fixture(scope="module")
def original():
    return load_digits()


def read(source, split):
    examples = list(source.splits[split].stream())
    return np.stack([example.image for example in examples]), np.array([example.label for example in examples])


def test_every_digit_is_in_one_split_with_its_ink_to_the_gray_step(original, data_config):
    source = open_source(data_config("sklearn_digits", test_fraction=0.3))
    images, labels = (np.concatenate(parts) for parts in zip(read(source, "train"), read(source, "test"), strict=True))
    ink = [tuple(image.ravel()) for image in np.rint(images.astype(float) * 16 / 255).astype(int)]
    expected = [tuple(image.ravel()) for image in original.images.astype(int)]
    assert sorted(zip(ink, labels.tolist(), strict=True)) == sorted(
        zip(expected, original.target.tolist(), strict=True)
    )
    assert set(np.unique(images)) == {(255 * ink * 2 + 16) // 32 for ink in range(17)}
    assert [source.splits[split].count for split in ("train", "test")] == [1258, 539]


def test_classes_are_balanced_in_the_test_split(original, data_config):
    _, labels = read(open_source(data_config("sklearn_digits", test_fraction=0.3)), "test")
    shares = np.bincount(labels) / np.bincount(original.target)
    assert np.abs(shares - 0.3).max() < 0.01


def test_other_sizes_are_resized(data_config):
    images, _ = read(open_source(data_config("sklearn_digits", image_size=16)), "test")
    assert images.shape[1:] == (16, 16, 1)
