"""Training on a stream of windows: resumes bit for bit, and two workers follow one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from local_training import train_locally
from safetensors.torch import load_file

from ncsn.config import from_yaml
from ncsn.data.training_images import StreamedSplit, open_training_images
from ncsn.training.batches import draw_batch, image_moments
from ncsn.training.loop import TrainingJob

STREAM = ["data.loader=stream", "data.window_images=64"]


def test_a_resumed_training_equals_one_that_was_not_interrupted(tiny: str, dataset: str, tmp_path: Path) -> None:
    config = from_yaml(tiny, overrides=STREAM)
    weights = []
    for name, stops in (("whole", (160,)), ("halves", (80, 160))):
        for stop in stops:
            job = TrainingJob(config=config, dataset=dataset, stop_at=stop)
            outcome = train_locally(job, tmp_path / name)
        assert outcome.images_seen == 160
        weights.append(load_file(tmp_path / name / outcome.checkpoint / "weights.safetensors"))
    whole, halves = weights
    assert all(torch.equal(whole[key], halves[key]) for key in whole)


def test_workers_share_the_global_batch_of_one(tiny: str, dataset: str) -> None:
    config = from_yaml(tiny, overrides=STREAM)
    split = open_training_images(dataset, config.data)
    assert isinstance(split, StreamedSplit)
    whole = draw_batch(config, split, first=1250, count=16)  # over the end of the first epoch
    parts = [draw_batch(config, split, first=1250 + 4 * rank, count=4) for rank in range(4)]
    for name in ("x", "level", "z"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    cached = open_training_images(dataset, from_yaml(tiny).data)
    assert torch.equal(image_moments(config, split).mean, image_moments(config, cached).mean)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ray_workers_follow_the_loss_of_one(tiny: str, dataset: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(tiny)
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    traces = []
    for workers in (1, 2):
        settings = [*STREAM, f"compute.num_workers={workers}", f"storage.root={tmp_path}"]
        command = [sys.executable, "-m", "ncsn", "train", "--config", str(tmp_path / "config.yaml")]
        command += ["--run", f"workers-{workers}", "--dataset", dataset]
        command += [part for setting in settings for part in ("--set", setting)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=420)
        assert done.returncode == 0, done.stderr[-3000:]
        history = json.loads((tmp_path / "runs" / f"workers-{workers}" / "history.json").read_text())
        traces.append([point["train/loss"] for point in history["points"]])
    one, two = traces
    assert len(one) >= 5
    assert one == pytest.approx(two, rel=1e-4)
