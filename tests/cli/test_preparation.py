"""`ncsn suggest-noise` prints a config's sections, and `ncsn import-checkpoint` says what it lacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from ncsn.cli.app import app
from ncsn.config import from_yaml
from ncsn.core.noise_schedule import variance_ratio

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"


def test_a_suggestion_is_yaml_that_a_config_takes() -> None:
    done = CliRunner().invoke(app, ["suggest-noise", "--config", str(DIGITS), "--sigma-L", "0.03"])
    assert done.exit_code == 0, done.output
    sections = yaml.safe_load(done.output)
    config = from_yaml(yaml.safe_dump(yaml.safe_load(DIGITS.read_text()) | {"noise": sections["noise"]}))
    assert config.levels.sigma_1 == pytest.approx(4.8, abs=0.2) and config.levels.sigma_L == 0.03
    ratio = (config.levels.sigma_1 / 0.03) ** (1 / (config.levels.num_levels - 1))
    epsilon = sections["sampling"]["sampler"]["epsilon"]
    assert variance_ratio(epsilon, sigma_L=0.03, ratio=ratio, steps_per_level=5) < 1.25
    assert done.output.startswith("# images     1,258, all\n")


def test_mirrored_images_are_as_far_apart_or_farther() -> None:
    def suggest(*options: str) -> dict[str, float]:
        arguments = ["suggest-noise", "--config", str(DIGITS), "--json", *options]
        values: dict[str, float] = json.loads(CliRunner().invoke(app, arguments).output)
        return values

    plain, mirrored = suggest(), suggest("--mirrored")
    assert mirrored["sigma_1"] > plain["sigma_1"]
    assert mirrored == suggest("--set", "data.horizontal_flip=true")


@pytest.mark.parametrize("arguments", [[], ["--config", str(DIGITS), "--data", "/d"]])
def test_a_suggestion_needs_one_set_of_images(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["suggest-noise", *arguments])
    assert done.exit_code == 2
    assert done.output.startswith("error: --config: ")


def test_an_import_needs_ingested_images(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pth"
    file.write_bytes(b"")
    store = f"storage.root={tmp_path}"
    done = CliRunner().invoke(app, ["import-checkpoint", str(file), "--config", str(DIGITS), "--set", store])
    assert done.exit_code == 2
    assert done.output.startswith("error: --dataset: ")
