"""Training on a stream of windows: resumes bit for bit, and two workers follow one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from local_training import train_locally
from safetensors.torch import load_file

from ncsn.config import from_yaml
from ncsn.data import training_images
from ncsn.data.training_images import StreamedSplit, open_cache, open_training_images
from ncsn.training.batches import draw_batch, image_moments
from ncsn.training.loop import TrainingJob


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every split is read in windows of 64 images."""
    monkeypatch.setattr(training_images, "WINDOW_BYTES", 64 * 64)


@pytest.mark.usefixtures("windows")
def test_a_resumed_training_equals_one_that_was_not_interrupted(tiny: str, dataset: str, tmp_path: Path) -> None:
    config = from_yaml(tiny)
    weights = []
    for name, stops in (("whole", (160,)), ("halves", (80, 160))):
        for stop in stops:
            job = TrainingJob(config=config, dataset=dataset, stop_at=stop)
            outcome = train_locally(job, tmp_path / name)
        assert outcome.images_seen == 160
        weights.append(load_file(tmp_path / name / outcome.checkpoint / "weights.safetensors"))
    whole, halves = weights
    assert all(torch.equal(whole[key], halves[key]) for key in whole)


@pytest.mark.usefixtures("windows")
def test_workers_share_the_global_batch_of_one(tiny: str, dataset: str) -> None:
    config = from_yaml(tiny)
    split = open_training_images(dataset)
    assert isinstance(split, StreamedSplit)
    whole = draw_batch(config, split, first=1250, count=16)  # over the end of the first epoch
    parts = [draw_batch(config, split, first=1250 + 4 * rank, count=4) for rank in range(4)]
    for name in ("x", "level", "z"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    cached = open_cache(dataset, "train")
    assert torch.equal(image_moments(config, split).mean, image_moments(config, cached).mean)
