"""A folder of generated images belongs to one model, seed and sampler; `ncsn sample --model` is in tests/e2e."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refused import refused

from ncsn.tools.models import _claim

SOURCE = {"model": "models:/digits/1", "seed": 0, "sampler": {"kind": "annealed_langevin", "epsilon": 1e-4}}


def test_a_folder_is_taken_once_and_found_again(tmp_path: Path) -> None:
    folder = str(tmp_path / "images")
    _claim(folder, SOURCE)
    _claim(folder, SOURCE)
    assert json.loads((tmp_path / "images" / "manifest.json").read_text()) == SOURCE


@pytest.mark.parametrize(
    "change", [{"seed": 5}, {"model": "models:/digits/2"}, {"sampler": {"kind": "langevin"}}], ids=lambda it: min(it)
)
def test_images_of_two_sources_are_not_mixed(tmp_path: Path, change: dict[str, object]) -> None:
    _claim(str(tmp_path), SOURCE)
    with refused("--out") as caught:
        _claim(str(tmp_path), SOURCE | change)
    (name,) = change
    assert f"{name} {SOURCE[name]!r}" in str(caught.value) and repr(change[name]) in str(caught.value)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.pdf").write_bytes(b"")
    with refused("--out"):
        _claim(str(tmp_path), SOURCE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.pdf"]
