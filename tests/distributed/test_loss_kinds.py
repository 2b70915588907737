"""Each loss that a config can choose trains, resumes to the last bit, and belongs to the run's identity."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from local_training import assert_same_tensors, train_locally, train_until_killed

from ncsn.config import from_yaml
from ncsn.data.training_images import open_cache
from ncsn.model import build
from ncsn.training.batches import draw_batch
from ncsn.training.loop import TrainingJob

SSM = "loss={kind: ssm}"
ONE_SIGMA = (
    "loss={kind: dsm, anneal_power: 0}",
    "noise={sigma_1: 0.1, sigma_L: 0.1, num_levels: 1}",
    "network={kind: ncsn, num_features: 4}",
    "sampling.sampler={kind: langevin, num_steps: 3, step_size: 1.0e-4}",
)


AUGMENTED = (
    "data.horizontal_flip=false",
    "data.augmentation={probability: 0.5}",
    "noise.training={kind: lognormal}",
    "network={kind: ddpmpp, base_width: 8, multipliers: [1, 1], blocks_per_resolution: 1, attention_sizes: []}",
    "loss={weighting: edm}",
    "compute.microbatch=5",
)
CLASSES = ("data.num_classes=10", "train.label_dropout=0.3", "network.dropout=0.1")


def checkpoint_after(tiny: str, dataset: str, folder: Path, *overrides: str) -> Path:
    config = from_yaml(tiny, overrides=overrides)
    return folder / train_locally(TrainingJob(config=config, dataset=dataset), folder).checkpoint


@pytest.mark.parametrize(
    "overrides", [(SSM,), ONE_SIGMA, AUGMENTED, CLASSES], ids=["ssm", "one", "augmented", "classes"]
)
@pytest.mark.parametrize("window", [64 * 64, 1 << 30], ids=["streamed", "whole"])
def test_resume_is_bitwise(
    overrides: tuple[str, ...], window: int, tiny: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 steps = 3 + resume + 3, for each loss and each way to read the images."""
    monkeypatch.setattr("ncsn.data.training_images.WINDOW_BYTES", window)
    short = ("train.num_images=96", "optimizer.decay=constant")
    whole = checkpoint_after(tiny, dataset, tmp_path / "whole", *overrides, *short)

    halves = from_yaml(tiny, overrides=[*overrides, *short, "train.checkpoint_every_images=48"])
    train_until_killed(TrainingJob(config=halves, dataset=dataset), tmp_path / "halves")
    second = checkpoint_after(tiny, dataset, tmp_path / "halves", *overrides, *short)
    assert (tmp_path / "halves" / "images-000000048").is_dir()
    assert_same_tensors(whole, second)


@pytest.mark.parametrize(
    "network",
    [
        "{kind: unet, widths: [8], embedding_features: 8, attention_sizes: [8], dropout: 0.1}",
        "{kind: ddpmpp, base_width: 8, multipliers: [1], blocks_per_resolution: 1, attention_sizes: [], dropout: 0.1}",
        "{kind: ncsn, num_features: 4}",
        "{kind: ncsnv2, num_features: 4}",
    ],
)
def test_sliced_score_matching_differentiates_every_network_twice(network: str, tiny: str, dataset: str) -> None:
    config = from_yaml(tiny, overrides=[SSM, f"network={network}"])
    state = build.train_state(config)
    with torch.no_grad():
        for parameter in state.network.parameters():
            parameter.add_(0.02)  # an output layer that starts at zero hides the gradients behind it
    batch = draw_batch(config, open_cache(dataset, "train"), first=0, count=4)
    loss = build.loss(config)(state.network, batch).loss
    torch.autograd.backward(loss)
    gradients = [parameter.grad for parameter in state.network.parameters()]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
