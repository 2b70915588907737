"""The noise levels of `noise: auto`, from the images that ingest compares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from do import claimed
from refused import refused
from tiny_networks import tiny_config

from ncsn import storage
from ncsn.config import Config, changed_settings, from_yaml
from ncsn.core.noise_schedule import ratio_for_overlap
from ncsn.data import noise_levels
from ncsn.data.dataset import write_dataset
from ncsn.data.format import load_manifest
from ncsn.data.noise_levels import resolve_noise, sample_places, suggestions
from ncsn.data.sources import open_source
from ncsn.data.training_images import open_cache
from ncsn.runs.run import Run
from ncsn.steps.train import settle_noise


def auto(root: Path, *overrides: str) -> Config:
    return tiny_config("noise=auto", f"storage.root={root}", *overrides)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("store")
    data = tiny_config().data
    return write_dataset(open_source(data), str(root), name="digits", data=data).uri


def test_auto_is_the_largest_distance_and_the_overlap(dataset: str, tmp_path: Path) -> None:
    manifest, images = load_manifest(dataset), np.asarray(open_cache(dataset, "train").images)
    flat = images.reshape(len(images), -1) / 255
    squared = (flat**2).sum(1)
    largest = np.sqrt((squared[:, None] + squared - 2 * flat @ flat.T).max())
    levels = resolve_noise(auto(tmp_path), manifest).levels
    assert levels.sigma_1 == pytest.approx(largest, rel=1e-3) and levels.sigma_L == 0.01
    wider = resolve_noise(auto(tmp_path, "noise={kind: auto, sigma_L: 0.1}"), manifest).levels
    assert wider.sigma_L == 0.1
    for each in (levels, wider):
        assert (each.sigma_1 / each.sigma_L) ** (1 / (each.num_levels - 1)) <= ratio_for_overlap(64)
        assert (each.sigma_1 / each.sigma_L) ** (1 / (each.num_levels - 2)) > ratio_for_overlap(64)
    mirrored = resolve_noise(auto(tmp_path, "data.horizontal_flip=true"), manifest).levels
    assert mirrored.sigma_1 >= levels.sigma_1


def test_the_run_gets_the_levels_that_were_chosen(dataset: str, tmp_path: Path) -> None:
    manifest, config = load_manifest(dataset), auto(tmp_path)
    folder = claimed(config, "mine")
    settled = settle_noise(Run(config, "mine"), manifest)
    assert from_yaml(storage.read_text(folder.config)) == settled
    assert claimed(config, "mine") == claimed(settled, "mine") == folder
    assert changed_settings(config, settled) == {}
    assert settle_noise(Run(config, "mine"), manifest) == settled
    for other in ("noise={num_levels: 3}", "noise={kind: auto, sigma_L: 0.02}"):
        with pytest.raises(ValueError, match=r"noise\.num_levels"):
            settle_noise(Run(auto(tmp_path, other), "mine"), manifest)


def test_images_that_are_all_alike_have_no_levels(dataset: str, tmp_path: Path) -> None:
    assert suggestions(np.full((3, 8, 8, 1), 7, np.uint8)) == {}
    with refused("noise"):
        resolve_noise(auto(tmp_path), replace(load_manifest(dataset), suggested_noise={}))


def test_a_sample_has_places_once_and_is_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_levels, "MOST_IMAGES", 20)
    assert sample_places(20, 64).tolist() == list(range(20))
    chosen = sample_places(2000, 64)
    assert len(chosen) == 20 and (np.diff(chosen, prepend=-1, append=2000) > 0).all()
    assert 600 < chosen.mean() < 1400 and np.array_equal(chosen, sample_places(2000, 64))
    assert len(sample_places(300, noise_levels._MOST_BYTES // 5)) == 5  # of large images
