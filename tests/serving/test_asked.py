"""What a request may say, and the files that answer it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refused import refused
from served import TEXT, trained_by

from ncsn.config import from_yaml, to_yaml
from ncsn.data.dataset import write_dataset
from ncsn.data.sources import open_source
from ncsn.model import build
from ncsn.model.generate import generate, image_labels
from ncsn.serving.asked import answer, read, settings
from ncsn.tracking.model import PyfuncModel
from ncsn.training.batches import classes_of

TRAINED = trained_by(0)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("{", ""),
        ("[" * 100_000, ""),
        ({"count": 3}, "count"),
        ({"number": 0}, "number"),
        ({"number": 257}, "number"),
        ({"number": True}, "number"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"guidance": float("nan")}, "guidance"),
        ({"format": "gif"}, "format"),
        ({"format": "png", "number": 2}, "format"),
        ({"sampler": "a=b"}, "sampler"),
        ({"class": "fish"}, "class"),
        ({"class": "3"}, "class"),
        ({"class": "a: {b"}, "class"),
        ({"sampler": "nothing"}, "sampler.kind"),
        ({"sampler": {"kind": "karras_heun", "num_steps": 1000}}, "sampler"),
        ({"sampler": {"kind": "karras_heun", "steps": 3}}, "sampler.steps"),
    ],
)
def test_what_is_no_request_or_the_model_cannot_follow_is_refused_with_the_key(given: Any, key: str) -> None:
    body = given if isinstance(given, str) else json.dumps(given)
    with refused(key):
        settings(TRAINED, read(body.encode()))


def test_a_request_changes_what_it_names() -> None:
    asked = read(b'{"number": 5, "seed": 7, "class": 1, "guidance": 2.5, "sampler": {"kind": "dpm_solver"}}')
    found = settings(TRAINED, asked)
    assert (asked.count, asked.format, found.seed, found.label) == (5, "grid", 7, "1")
    assert found.sampler.kind == "dpm_solver" and found.guidance is not None and found.guidance.weight == 2.5
    assert settings(TRAINED, read(b"")) == TRAINED.config.sampling
    assert (read(b'{"format": "png"}').count, read(b"").count) == (1, 16)
    guided = from_yaml(TEXT, overrides=["sampling.guidance={kind: classifier_free, weight: 3}"])
    for trained in (TRAINED, replace(TRAINED, config=guided)):
        zero = settings(trained, read(b'{"guidance": 0}')).guidance
        assert zero is not None and zero.weight == 0
    assert settings(TRAINED, read(b'{"guidance": 1}')).guidance is None


def test_classes_have_the_names_of_their_folders_whatever_yaml_takes_them_for(tmp_path: Path) -> None:
    names = ["1e3", "no", "null", "on", "yes", "😀"]
    for place, name in enumerate(names):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("L", (8, 8), 4 * place + number).save(tmp_path / name / f"{number}.png")
    given = {"source": "image_folder", "root": tmp_path, "num_classes": len(names)}
    config = from_yaml(TEXT, overrides=[f"data.{key}={value}" for key, value in given.items()])
    manifest = write_dataset(open_source(config.data), f"{tmp_path}/store", name="answers", data=config.data).manifest
    assert manifest.class_names == names
    network, classes = build.network(config).eval(), classes_of(config, manifest)
    trained = replace(TRAINED, config=config, network=network, classes=classes)
    model = PyfuncModel()
    model.trained = trained
    for number, name in enumerate(names):
        sampling = from_yaml(to_yaml(config), overrides=[f"sampling.label={name}"]).sampling
        assert image_labels(trained, sampling, first=0, count=2).tolist() == [number, number]
        assert settings(trained, read(json.dumps({"class": name}).encode())) == sampling
        image = generate(trained, sampling=sampling, first=0, count=1)
        np.testing.assert_array_equal(model.predict(None, None, {"label": name, "n_images": 1}), image)


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
