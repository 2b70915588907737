"""The fixed choice of test images, and names inside archives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from refused import refused

from ncsn.data.source import BadImages, held_out, safe_member


@pytest.mark.parametrize(
    ("count", "fraction", "expected"), [(1797, 0.3, 539), (10, 0.1, 1), (100, 0.07, 7), (3, 0.5, 1)]
)
def test_the_share_is_exact(count, fraction, expected):
    assert held_out([str(index) for index in range(count)], [0] * count, fraction).sum() == expected


def test_each_class_gives_its_share(rng):
    labels = rng.permutation(np.repeat(np.arange(10), 40)).tolist()
    chosen = held_out([str(index) for index in range(400)], labels, 0.25)
    shares = np.bincount(np.array(labels)[chosen], minlength=10)
    assert shares.tolist() == [10] * 10


def test_the_choice_goes_with_the_name_and_not_with_the_place():
    names = [f"image {index}" for index in range(50)]
    chosen = {name for name, held in zip(names, held_out(names, [0] * 50, 0.2), strict=True) if held}
    backwards = names[::-1]
    assert {name for name, held in zip(backwards, held_out(backwards, [0] * 50, 0.2), strict=True) if held} == chosen
    assert chosen != set(names[:10])


def test_two_images_are_enough_to_hold_one_out():
    assert held_out(["a", "b"], [0, 0], 0.1).sum() == 1
    assert held_out(["a"], [0], 0.1).sum() == 0


def test_bad_images_stop_or_are_noted():
    with refused("a.png"):
        BadImages(skip=False).handle("a.png", "cut")
    bad = BadImages(skip=True)
    bad.handle("a.png", "cut")
    assert bad.skipped[0].name == "a.png"
    assert bad.skipped[0].reason == "cut"


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.png", "a/../../x", "C:\\x.png", "..\\x.png", "\\x"])
def test_names_that_leave_the_archive_are_refused(name):
    with refused("a.zip"):
        safe_member(name, archive=Path("a.zip"))


def test_ordinary_names_pass():
    assert safe_member("img_align_celeba/000001.jpg", archive=Path("a.zip")).name == "000001.jpg"
    assert safe_member("a..b/c...jpg", archive=Path("a.zip")).name == "c...jpg"
