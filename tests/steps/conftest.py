"""What several steps' tests begin with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from experiments import SHORT, tiny

from ncsn import progress
from ncsn.config import Config
from ncsn.core.ema import Ema, step_decay
from ncsn.core.images import fit_moments, to_unit
from ncsn.core.training import TrainState
from ncsn.data.format import load_manifest, read_split
from ncsn.model import build, checkpoint
from ncsn.training.batches import classes_of


@pytest.fixture(autouse=True)
def _slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last progress is waited for however long a busy machine's disk takes."""
    monkeypatch.setattr(progress, "_LAST_SECONDS", 120.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a module's tests."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def config(root: Path) -> Config:
    return tiny(root, *SHORT, "data.max_images=20")


@pytest.fixture(scope="session")
def save_untrained() -> Callable[[Config, str, Path], None]:
    """Writes a checkpoint of a network that was never trained: config, URI of the dataset, folder."""

    def save(config: Config, dataset: str, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        network, manifest = build.network(config), load_manifest(dataset)
        optimizer, ema = torch.optim.Adam(network.parameters()), Ema(network, step_decay(0.9))
        moments = fit_moments(to_unit(torch.from_numpy(read_split(dataset, "train").images)))
        state, of_data = TrainState(network, optimizer, ema, images_seen=8), classes_of(config, manifest)
        checkpoint.snapshot(
            config=config, state=state, moments=moments, dataset_digest=manifest.digest, classes=of_data
        )(folder)

    return save
