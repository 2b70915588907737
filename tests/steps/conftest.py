"""What several steps' tests begin with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ncsn import progress
from ncsn.config import Config, from_yaml
from ncsn.core.ema import Ema, step_decay
from ncsn.core.images import fit_moments, to_unit
from ncsn.core.training import TrainState
from ncsn.data.format import load_manifest, read_split
from ncsn.model import build, checkpoint
from ncsn.training.batches import classes_of

EXPERIMENT = """
name: tiny
data: {source: sklearn_digits, image_size: 8, channels: 1, max_images: 20}
noise: {num_levels: 2, sigma_L: 0.1}
network: {kind: unet, widths: [8], blocks_per_resolution: 1, embedding_features: 8}
train: {batch_size: 4, num_images: 8, checkpoint_every_images: 8, report_every_images: 4}
sampling: {num_images: 4, sampler: {kind: annealed_langevin, steps_per_level: 2, epsilon: 1.0e-4}}
evaluation: {num_splits: 2}
"""

SaveUntrained = Callable[[Config, str, Path], None]


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
    return from_yaml(EXPERIMENT, overrides=[f"storage.root={root}"])


@pytest.fixture(scope="session")
def save_untrained() -> SaveUntrained:
    """Writes a checkpoint of a network that was never trained: config, URI of the dataset, folder."""

    def save(config: Config, dataset: str, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        network = build.network(config)
        state = TrainState(
            network, torch.optim.Adam(network.parameters()), Ema(network, step_decay(0.9)), images_seen=8
        )
        moments = fit_moments(to_unit(torch.from_numpy(read_split(dataset, "train").images)))
        digest = load_manifest(dataset).digest
        classes = classes_of(config, load_manifest(dataset))
        checkpoint.snapshot(config=config, state=state, moments=moments, dataset_digest=digest, classes=classes)(folder)

    return save
