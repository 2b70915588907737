"""Registered models: exported weights, folders of images, and their evaluation; `sample --model` is in tests/e2e."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from refused import refused

from ncsn.config import from_yaml, to_json, training_settings
from ncsn.core.images import fit_moments
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.classes import Classes
from ncsn.runs.folder import RUN_PATTERN
from ncsn.tools import models
from ncsn.tools.models import ModelSamples, run_of_images

DIGITS = (Path(__file__).parents[2] / "configs" / "digits.yaml").read_text()


@pytest.mark.parametrize(("change", "key"), [("label=fish", "label"), ("relative_width=0.1", "relative_width")])
def test_what_a_registered_model_cannot_follow_is_refused(change: str, key: str) -> None:
    pets = ["data.num_classes=2", "train.ema={kind: power}", "network.widths=[8]", "network.blocks_per_resolution=1"]
    config = from_yaml(DIGITS, overrides=pets)
    moments = fit_moments(torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    trained = TrainedNetwork(
        config=config, network=build.network(config), moments=moments, classes=Classes(("cat", "dog"), (1, 2))
    )
    assert models._config(trained, ["sampling.label=dog"], origin="m").sampling.label == "dog"
    with refused(f"sampling.{key}"):
        models._config(trained, [f"sampling.{change}"], origin="m")


def test_images_are_evaluated_with_the_registered_config_in_their_own_run(tmp_path: Path) -> None:
    folder = tmp_path / "generated" / "NCSN.Digits" / "3" / "0123456789ab"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(to_json(from_yaml(DIGITS)))
    images = ModelSamples(str(folder), "grid.png", 16, 9, 1.0, "models:/NCSN.Digits/3")
    changes = ["sampling.num_images=16", "storage.root=/other"]
    config, run = run_of_images(images, root="/elsewhere", overrides=changes)
    assert run == "ncsn-digits-3-0123456789ab" and RUN_PATTERN.fullmatch(run)
    assert (config.sampling.num_images, config.storage.root) == (16, "/elsewhere")
    assert training_settings(config) == training_settings(from_yaml(DIGITS))


def test_few_images_need_no_settings_of_the_evaluation(tmp_path: Path) -> None:
    many = ["sampling.num_images=512", "evaluation.num_splits=10"]
    registered = from_yaml(DIGITS, overrides=[*many, "network.widths=[8]", "network.blocks_per_resolution=1"])
    moments = fit_moments(torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    trained = TrainedNetwork(config=registered, network=build.network(registered), moments=moments)
    few = ["sampling.num_images=4"]
    assert models._config(trained, few, origin="m").sampling.num_images == 4
    with refused("sampling.num_images"):
        models._config(trained, [*few, "evaluation.num_splits=8"], origin="m")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(to_json(registered))
    images = ModelSamples(str(tmp_path), "grid.png", 4, 9, 1.0, "models:/digits/3")
    evaluation = run_of_images(images, root="/elsewhere", overrides=few)[0].evaluation
    assert evaluation.num_splits == 4
    images = ModelSamples(str(tmp_path), "grid.png", 512, 9, 1.0, "models:/digits/3")
    assert run_of_images(images, root="/elsewhere")[0].evaluation == registered.evaluation
