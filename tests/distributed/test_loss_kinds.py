"""Each loss that a config can choose trains, resumes to the last bit, and belongs to the run's identity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from local_training import assert_same_tensors, train_locally

from ncsn.config import from_yaml
from ncsn.data.training_images import open_cache
from ncsn.model import build
from ncsn.model.checkpoint_store import CheckpointStore
from ncsn.training.batches import augmented, draw_batch
from ncsn.training.context import LocalContext
from ncsn.training.loop import TrainingJob, train_loop

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


def checkpoint_after(tiny: str, dataset: str, folder: Path, *overrides: str) -> Path:
    config = from_yaml(tiny, overrides=overrides)
    return folder / train_locally(TrainingJob(config=config, dataset=dataset), folder).checkpoint


@pytest.mark.parametrize(
    "overrides",
    [(SSM,), ONE_SIGMA, AUGMENTED],
    ids=["ssm", "one", "augmented"],
)
def test_resume_is_bitwise(overrides: tuple[str, ...], tiny: str, dataset: str, tmp_path: Path) -> None:
    """6 steps = 3 + resume + 3, for each loss."""
    short = ("train.num_images=96", "optimizer.decay=constant")
    whole = checkpoint_after(tiny, dataset, tmp_path / "whole", *overrides, *short)

    class DiesAfterFirstCheckpoint(CheckpointStore):
        def publish(self, write: Callable[[Path], None], *, name: str) -> None:
            super().publish(write, name=name)
            raise KeyboardInterrupt

    halves = from_yaml(tiny, overrides=[*overrides, *short, "train.checkpoint_every_images=48"])
    with pytest.raises(KeyboardInterrupt):
        train_loop(
            TrainingJob(config=halves, dataset=dataset),
            LocalContext(),
            DiesAfterFirstCheckpoint(str(tmp_path / "halves")),
        )
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


def test_projections_belong_to_the_image_and_not_to_the_batch(tiny: str, dataset: str) -> None:
    config, split = from_yaml(tiny, overrides=[SSM]), open_cache(dataset, "train")
    whole = draw_batch(config, split, first=1250, count=8)
    parts = [draw_batch(config, split, first=1250 + 4 * rank, count=4) for rank in range(2)]
    assert whole.v is not None and whole.v.shape == (1, 8, 1, 8, 8)
    assert torch.equal(whole.v, torch.cat([part.v for part in parts if part.v is not None], dim=1))
    assert not torch.equal(whole.v[0], whole.z)


def test_augmentation_belongs_to_the_image_and_moves_no_other_draw(tiny: str, dataset: str) -> None:
    config, split = from_yaml(tiny, overrides=AUGMENTED), open_cache(dataset, "train")
    plain = draw_batch(from_yaml(tiny, overrides=[*AUGMENTED, "data.augmentation=null"]), split, first=1250, count=8)
    whole = augmented(config, draw_batch(config, split, first=1250, count=8), first=1250)
    parts = [augmented(config, draw_batch(config, split, first=first, count=4), first=first) for first in (1250, 1254)]
    assert torch.equal(whole.z, plain.z) and torch.equal(whole.sigma, plain.sigma)
    told = whole.conditions["augmentation"]
    assert told.shape == (8, 9) and torch.equal(told, torch.cat([part.conditions["augmentation"] for part in parts]))
    torch.testing.assert_close(whole.x, torch.cat([part.x for part in parts]))
    changed = (whole.x != plain.x).flatten(1).any(dim=1)
    assert torch.equal(changed, told.any(dim=1)) and changed.any() and not changed.all()
    assert torch.equal(whole[2:5].inputs["augmentation"], told[2:5])
