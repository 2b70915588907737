"""The documented config says everything and is a config."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ncsn.cli.views import documented_yaml
from ncsn.config import Config, flatten, from_yaml

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def comment_above(text: str, line_start: str) -> str:
    lines = text.splitlines()
    end = next(index for index, line in enumerate(lines) if line.strip().startswith(line_start))
    start = end
    while lines[start - 1].strip().startswith("#"):
        start -= 1
    return " ".join(line.strip().removeprefix("# ") for line in lines[start:end])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_parses_to_the_same_config(path: Path) -> None:
    config = from_yaml(path.read_text())
    assert from_yaml(documented_yaml(config)) == config


def test_every_value_has_a_comment(config_file: Path) -> None:
    config = from_yaml(config_file.read_text())
    text = documented_yaml(config)
    assert yaml.safe_load(text).keys() == Config.model_fields.keys()
    for path in flatten(config):
        assert comment_above(text, f"{path.split('.')[-1]}:").partition(" ")[0] not in ("", "None")


def test_meaning_range_and_default(config_file: Path) -> None:
    text = documented_yaml(from_yaml(config_file.read_text()))
    comment = comment_above(text, "ema_decay:")
    assert "average of the weights" in comment
    assert comment.endswith("[>= 0; < 1; default 0.999]")
    assert comment_above(text, "decay:").endswith("[one of constant, linear, cosine; default constant]")
    assert comment_above(text, "channels:").endswith("[one of 1, 3]")
    assert "Other kinds, with settings of their own: ncsn" in comment_above(text, "network:")
