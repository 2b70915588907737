"""A folder of generated images belongs to one model, seed and sampler; `ncsn sample --model` is in tests/e2e."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ncsn.steps.sample_model import _claim

SOURCE = {"model": "models:/digits/1", "seed": 0, "sampler": {"kind": "annealed_langevin", "epsilon": 1e-4}}


def test_a_folder_is_taken_once_and_found_again(tmp_path: Path) -> None:
    folder = str(tmp_path / "images")
    _claim(folder, SOURCE)
    _claim(folder, SOURCE)
    assert json.loads((tmp_path / "images" / "manifest.json").read_text()) == SOURCE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "holds images of seed 0, not of 5; choose another --out"),
        ({"model": "models:/digits/2"}, "holds images of model 'models:/digits/1', not of 'models:/digits/2'"),
        ({"sampler": {"kind": "langevin"}}, "holds images of sampler .*annealed_langevin.*, not of .*langevin"),
    ],
)
def test_images_of_two_sources_are_not_mixed(tmp_path: Path, change: dict[str, object], message: str) -> None:
    _claim(str(tmp_path), SOURCE)
    with pytest.raises(ValueError, match=message):
        _claim(str(tmp_path), SOURCE | change)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.pdf").write_bytes(b"")
    with pytest.raises(ValueError, match="is not empty and not a folder of samples; choose another --out"):
        _claim(str(tmp_path), SOURCE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.pdf"]
