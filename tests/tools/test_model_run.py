"""The run under which a registered model's images are evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest

from ncsn.config import from_yaml, to_json, training_settings
from ncsn.runs.folder import RUN_PATTERN
from ncsn.tools.models import ModelSamples, run_of_images

DIGITS = (Path(__file__).parents[2] / "configs" / "digits.yaml").read_text()


@pytest.fixture
def images(tmp_path: Path) -> ModelSamples:
    folder = tmp_path / "generated" / "NCSN.Digits" / "3" / "0123456789ab"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(to_json(from_yaml(DIGITS)))
    return ModelSamples(str(folder), "grid.png", 16, 9, 1.0, "models:/NCSN.Digits/3")


def test_it_is_named_after_model_version_and_settings(images: ModelSamples) -> None:
    _, run = run_of_images(images, root="/elsewhere")
    assert run == "ncsn-digits-3-0123456789ab"
    assert RUN_PATTERN.fullmatch(run)


def test_the_config_is_the_registered_one_with_what_was_changed(images: ModelSamples) -> None:
    config, _ = run_of_images(images, root="/elsewhere", overrides=["sampling.num_images=16", "storage.root=/other"])
    assert (config.sampling.num_images, config.storage.root) == (16, "/elsewhere")
    assert training_settings(config) == training_settings(from_yaml(DIGITS))
