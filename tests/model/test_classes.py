"""The class of each generated image, by the setting of the experiment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refused import refused

from ncsn.model.classes import Classes, require_label, require_same_classes
from ncsn.model.generate import image_labels

PETS = Classes(("cat", "dog", "1"), (10, 0, 30))


def labels(label: str, *, first: int = 0, count: int = 6, seed: int = 0, classes: Classes | None = PETS) -> list[int]:
    config = SimpleNamespace(data=SimpleNamespace(num_classes=3))
    trained: Any = SimpleNamespace(config=config, classes=classes)
    sampling: Any = SimpleNamespace(label=label, seed=seed)
    found = image_labels(trained, sampling, first=first, count=count)
    assert found is not None and found.dtype == torch.int64
    return found.tolist()


def test_labels_are_a_function_of_the_image() -> None:
    assert labels("balanced", classes=None) == [0, 1, 2, 0, 1, 2] and labels("balanced", first=4, count=2) == [1, 2]
    drawn = labels("data", count=100_000)
    assert labels("data", first=400, count=7) == drawn[400:407]
    assert labels("data", count=1000, seed=1) != drawn[:1000]
    assert labels("dog") == [1] * 6


def test_drawn_labels_are_as_frequent_as_in_training() -> None:
    drawn = torch.tensor(labels("data", count=100_000))
    shares = torch.bincount(drawn, minlength=3) / len(drawn)
    assert shares.tolist() == pytest.approx([0.25, 0.0, 0.75], abs=4 * (0.25 * 0.75 / len(drawn)) ** 0.5)


def test_a_class_is_a_name_or_else_a_number() -> None:
    assert [PETS.index(text, key="k") for text in ("cat", "2", "0", "1")] == [0, 2, 0, 2]
    for text in ("bird", "3", "-1", ""):
        with refused("sampling.label") as caught:
            require_label(text, PETS)
        assert "cat, dog, 1" in caught.value.problems[0].hint
    require_label("balanced", PETS)
    require_label("data", PETS)


def test_other_numbers_of_classes_are_refused() -> None:
    require_same_classes(None, ("a", "b"), where="here")
    require_same_classes(2, ("a", "b"), where="here")
    for number, names in ((3, ("a", "b")), (2, ())):
        with refused("data.num_classes") as caught:
            require_same_classes(number, names, where="here")
        assert caught.value.problems[0].value == number
    many = tuple(f"class-{number}" for number in range(1000))
    with refused("data.num_classes") as caught:
        require_same_classes(10, many, where="here")
    assert len(str(caught.value)) < 500 and "1000" in str(caught.value)
