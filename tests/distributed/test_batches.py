"""Batches: what a worker draws for an image depends on the place of the image alone, and parts average to the whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_networks import shaken

from ncsn.config import from_yaml
from ncsn.core.keyed_random import Stream, keyed_uniform
from ncsn.core.losses import Batch
from ncsn.core.training import StepOptions, train_step
from ncsn.data import training_images
from ncsn.data.streamed import StreamedSplit
from ncsn.data.training_images import open_cache, open_training_images
from ncsn.model import build
from ncsn.model.objective import objective_of
from ncsn.training.batches import draw_batch, image_moments
from ncsn.training.context import WorkerContext

CPU = torch.device("cpu")
CLASSES = ("data.num_classes=10", "train.label_dropout=0.3")
DRAWS = {
    "levels": (),
    "any sigma": ("noise={training: {kind: lognormal}}",),
    "classes": CLASSES,
    "projection": ("loss={kind: ssm}",),
    "pairs": (  # the second stage begins at 1256
        "loss={kind: consistency, from_scratch: true, q: 2, stages: 2}",
        "train.num_images=2512",
        "noise={training: {kind: lognormal}}",
        "sampling.sampler={kind: consistency}",
    ),
    "augmentation": (
        "data.horizontal_flip=false",
        "data.augmentation={probability: 0.5}",
        "network={kind: ddpmpp, base_width: 8, multipliers: [1], blocks_per_resolution: 1, attention_sizes: []}",
    ),
}


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """Everything that was drawn, the images first."""
    names = ("x", "z", "sigma", "level", "v", "lower")
    found = {name: getattr(batch, name) for name in names} | batch.conditions
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("window", [64 * 64, 1 << 30], ids=["streamed", "whole"])
@pytest.mark.parametrize("overrides", DRAWS.values(), ids=DRAWS)
def test_parts_of_a_batch_are_the_batch(overrides, window, tiny, dataset, monkeypatch) -> None:
    monkeypatch.setattr(training_images, "WINDOW_BYTES", window)
    config, split = from_yaml(tiny, overrides=overrides), open_training_images(dataset)
    assert isinstance(split, StreamedSplit) == (window == 64 * 64)

    def draw(first: int, count: int) -> Batch:  # over the end of the first epoch of 1258
        return draw_batch(config, objective_of(config), split, first=first, count=count).on(CPU, config)

    whole, parts = tensors(draw(1250, 16)), [tensors(draw(1250 + 4 * rank, 4)) for rank in range(4)]
    for name, tensor in whole.items():
        # The order of a matrix product's sums depends on the number of images: four, of 64 terms at most, of values
        # and weights that add up to less than two.
        rounding = 4 * 64 * 2 * torch.finfo(torch.float32).eps if name == "x" and config.data.augmentation else 0.0
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), tensor, rtol=0, atol=rounding)
    if "lower" in whole:
        assert whole["lower"].equal(objective_of(config).pairs.lower(whole["sigma"], first=1250))
    inside = draw(1250, 16)[3:7]
    assert all(torch.equal(part, whole[name][3:7]) for name, part in tensors(inside).items())
    file = Path(dataset, "moments", "dequantized.safetensors")
    file.unlink(missing_ok=True)
    found = image_moments(config, dataset, split)
    kept = image_moments(config, dataset, open_cache(dataset, "train"))
    assert torch.equal(kept.mean, found.mean) and kept.rest == pytest.approx(found.rest) and file.exists()


def test_a_share_of_the_labels_is_hidden(tiny: str, dataset: str) -> None:
    config, split = from_yaml(tiny, overrides=CLASSES), open_cache(dataset, "train")
    labels = draw_batch(config, objective_of(config), split, first=1250, count=64).conditions["labels"]
    rows = split.order(config.seed, first=1250, count=64)
    hidden = keyed_uniform(config.seed, stream=Stream.LABEL, first=1250, count=64, size=1)[:, 0].numpy() < 0.3
    np.testing.assert_array_equal(labels, np.where(hidden, -1, split.labels[rows]))
    assert 0 < hidden.sum() < 64


def test_augmentation_moves_no_other_draw(tiny: str, dataset: str) -> None:
    config, split = from_yaml(tiny, overrides=DRAWS["augmentation"]), open_cache(dataset, "train")
    drawn = draw_batch(config, objective_of(config), split, first=1250, count=8)
    whole, plain = drawn.on(CPU, config), replace(drawn, transforms=None).on(CPU, config)
    assert torch.equal(whole.z, plain.z) and torch.equal(whole.sigma, plain.sigma)
    changed = (whole.x != plain.x).flatten(1).any(dim=1)
    assert torch.equal(changed, whole.conditions["augmentation"].any(dim=1)) and changed.any() and not changed.all()


@pytest.mark.parametrize(("workers", "dropout"), [(2, 0.0), (3, 0.0), (3, 0.3)])
def test_gradients_of_parts_average_to_the_gradient_of_the_batch(tiny, dataset, workers, dropout) -> None:
    """1 worker x batch 8, 2 workers x batch 4, and 3 workers with 2, 3 and 3, give the same gradients (1e-6)."""
    config, split = from_yaml(tiny, overrides=[f"network.dropout={dropout}"]), open_cache(dataset, "train")

    def gradients(first: int, count: int, workers: int = 1) -> list[torch.Tensor]:
        state, objective = build.train_state(config), objective_of(config)
        shaken(state.network)  # the output layer starts at zero and would hide most gradients
        state.optimizer = torch.optim.SGD(state.network.parameters(), lr=0.0)
        batch = draw_batch(config, objective, split, first=first, count=count).on(CPU, config)
        options = StepOptions(batch_size=8, world_size=workers)
        train_step(state.network, batch, state=state, loss=objective.loss(None, None), options=options)
        return [parameter.grad for parameter in state.network.parameters() if parameter.grad is not None]

    shares = [WorkerContext(rank=rank, world_size=workers).share(8) for rank in range(workers)]
    assert [place for share in shares for place in share] == list(range(8))
    parts = [gradients(share.start, len(share), workers) for share in shares]
    for together, *each in zip(gradients(0, 8), *parts, strict=True):
        average = torch.stack(each).mean(dim=0)
        assert torch.allclose(together, average, rtol=1e-5, atol=1e-6 * float(together.abs().max() + 1))
