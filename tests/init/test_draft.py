"""Chosen settings, given settings, and the file that they become."""

from __future__ import annotations

import pytest
import yaml

from ncsn.config import ConfigError
from ncsn.init.draft import Draft


def test_what_is_given_is_not_chosen() -> None:
    draft = Draft(["train.batch_size=32", "sampling.sampler={kind: karras_heun}", "network={kind: ncsn}"])
    assert draft.choose("train.batch_size", 64) == 32
    assert draft.choose("train.num_images", 1000) == 1000
    assert not draft.section("sampling.sampler", "dpm_solver")
    assert not draft.section("network", "unet")
    assert draft.section("noise", "auto")
    assert not Draft(["noise.kind=geometric"]).section("noise", "auto")
    assert Draft(["noise.kind=auto"]).section("noise", "auto")
    assert draft.choose("sampling.sampler.num_steps", 5) == 5
    assert draft.tree == {
        "train": {"batch_size": 32, "num_images": 1000},
        "sampling": {"sampler": {"kind": "karras_heun"}},
        "network": {"kind": "ncsn"},
        "noise": {"kind": "auto"},
    }
    with pytest.raises(ConfigError):
        Draft(["train"])


def test_reasons_with_any_character_stay_comments() -> None:
    draft = Draft()
    draft.choose("name", "x", "Named a\nb: c\u2028d: e\x85f: g\x07.")
    assert yaml.safe_load(draft.to_yaml()) == {"name": "x"}


def test_the_file_has_the_order_of_the_schema_and_the_reasons_above_the_values() -> None:
    draft = Draft(["train.num_images=7"])
    draft.choose("data.image_size", 32, "Small.")
    draft.choose("data.source", "image_folder")
    draft.choose("name", "x", "A name.")
    text = draft.to_yaml(["What."])
    assert text.splitlines() == [
        "# What.", "", "# A name.", "name: x", "data:", "  source: image_folder", "  # Small.", "  image_size: 32",
        "train:", "  # As given.", "  num_images: 7",
    ]  # fmt: skip
    assert yaml.safe_load(text) == draft.tree
