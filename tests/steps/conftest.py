"""What several steps' tests begin with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ncsn.config import Config
from ncsn.core.ema import Ema, StepDecay
from ncsn.core.images import fit_moments, to_unit
from ncsn.core.training import TrainState
from ncsn.data.format import load_manifest
from ncsn.data.parquet import read_split
from ncsn.model import build, checkpoint
from ncsn.runs import records
from ncsn.training.batches import classes_of

SaveUntrained = Callable[[Config, str, Path], None]


@pytest.fixture(autouse=True)
def _slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last progress is waited for however long a busy machine's disk takes."""
    monkeypatch.setattr(records, "_LAST_SECONDS", 120.0)


@pytest.fixture(scope="session")
def save_untrained() -> SaveUntrained:
    """Writes a checkpoint of a network that was never trained: config, URI of the data set, folder."""

    def save(config: Config, dataset: str, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        network = build.network(config)
        state = TrainState(network, build.optimizer(config, network), Ema(network, StepDecay(0.9)), images_seen=8)
        moments = fit_moments(to_unit(torch.from_numpy(read_split(dataset, "train").images)))
        digest = load_manifest(dataset).digest
        classes = classes_of(config, load_manifest(dataset))
        checkpoint.save(folder, config=config, state=state, moments=moments, dataset_digest=digest, classes=classes)

    return save
