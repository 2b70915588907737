"""EMA weights as one file that says what network they are of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from refused import refused
from safetensors import safe_open

from ncsn.config import Config, from_json, from_yaml
from ncsn.core.images import fit_moments
from ncsn.core.training import Ema, TrainState
from ncsn.model import build, checkpoint
from ncsn.tools import models

EXPERIMENT = """
name: tiny
data: {source: sklearn_digits, image_size: 8, channels: 1}
noise: {num_levels: 2, sigma_L: 0.1}
network: {kind: unet, widths: [8], blocks_per_resolution: 1, embedding_features: 8}
train: {batch_size: 4, num_images: 8, checkpoint_every_images: 8, report_every_images: 4}
sampling: {num_images: 4, sampler: {kind: annealed_langevin, steps_per_level: 2, epsilon: 1.0e-4}}
evaluation: {num_splits: 2}
"""


@pytest.fixture
def config() -> Config:
    return from_yaml(EXPERIMENT)


def test_exported_weights_are_the_ema_and_build_the_network_again(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    network = build.network(config)
    state = TrainState(network, build.optimizer(config, network), Ema(network, decay=0.9), images_seen=8)
    with torch.no_grad():
        next(network.parameters()).add_(1)  # the weights in training are not what is exported
    moments = fit_moments(torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    checkpoint.save(folder, config=config, state=state, moments=moments, dataset_digest="d1")
    result = models.from_checkpoint(str(folder), out=str(tmp_path / "new" / "ema.safetensors"))
    assert (result.source, result.parameters) == (str(folder), sum(each.numel() for each in network.parameters()))
    with safe_open(result.uri, "pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 - not a dict
        stored = from_json(weights.metadata()["config"])
    rebuilt = checkpoint.network_from_weights(stored, tensors, origin=result.uri)
    for name, tensor in rebuilt.named_parameters():
        assert torch.equal(tensor, state.ema.weights[name])


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with refused(str(tmp_path / "nowhere"), error=checkpoint.CheckpointError):
        models.from_checkpoint(str(tmp_path / "nowhere"), out=str(tmp_path / "file"))
    assert not (tmp_path / "file").exists()
