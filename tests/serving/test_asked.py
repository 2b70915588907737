"""What a request may say, and the files that answer it."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refused import refused
from served import trained_by

from ncsn.serving.asked import answer, read, settings

TRAINED = trained_by(0)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("[1]", ""),
        ("{", ""),
        ("[" * 100_000, ""),
        ({"count": 3}, "count"),
        ({"number": 0}, "number"),
        ({"number": 257}, "number"),
        ({"number": True}, "number"),
        ({"number": 2.0}, "number"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"guidance": "2"}, "guidance"),
        ({"guidance": float("nan")}, "guidance"),
        ({"format": "gif"}, "format"),
        ({"format": ["grid"]}, "format"),
        ({"format": "png", "number": 2}, "format"),
        ({"class": [1]}, "class"),
        ({"sampler": "a=b"}, "sampler"),
        ({"sampler": 3}, "sampler"),
    ],
)
def test_a_request_that_is_none_is_refused_with_the_key(given: Any, key: str) -> None:
    with refused(key):
        read((given if isinstance(given, str) else json.dumps(given)).encode())


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"class": "fish"}, "class"),
        ({"class": "3"}, "class"),
        ({"class": "a: {b"}, "class"),
        ({"sampler": "nothing"}, "sampling.sampler.kind"),
        ({"sampler": {"kind": "karras_heun", "num_steps": 1000}}, "sampler"),
        ({"sampler": {"kind": "karras_heun", "steps": 3}}, "sampling.sampler.steps"),
    ],
)
def test_what_the_model_cannot_follow_is_refused_with_the_key(given: dict[str, Any], key: str) -> None:
    with refused(key):
        settings(TRAINED, read(json.dumps(given).encode()))


def test_a_request_changes_what_it_names() -> None:
    asked = read(b'{"number": 5, "seed": 7, "class": 1, "guidance": 2.5, "sampler": {"kind": "dpm_solver"}}')
    found = settings(TRAINED, asked)
    assert (asked.count, asked.format, found.seed, found.label) == (5, "grid", 7, "1")
    assert found.sampler.kind == "dpm_solver" and found.guidance is not None and found.guidance.weight == 2.5
    assert settings(TRAINED, read(b"")) == TRAINED.config.sampling
    assert (read(b'{"format": "png"}').count, read(b"").count) == (1, 16)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_the_files_hold_the_images(channels: int, mode: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, channels), np.uint8)
    png = Image.open(io.BytesIO(answer(images[:1], "png", limits=(0, 255))))
    assert png.mode == mode
    np.testing.assert_array_equal(np.asarray(png).reshape(images[0].shape), images[0])
    grid = Image.open(io.BytesIO(answer(images, "grid", limits=(0, 255))))
    assert grid.mode == mode and grid.width > grid.height, "three columns and two rows"
    with np.load(io.BytesIO(answer(images, "npz", limits=(0, 255)))) as found:
        np.testing.assert_array_equal(found["images"], images)
