"""Training with two averages: their snapshots, and a resume with both."""

from __future__ import annotations

from pathlib import Path

import pytest
from local_training import assert_same_tensors, train_locally, train_until_killed
from safetensors.torch import load_file

from ncsn.config import from_yaml
from ncsn.model.averages import build_average, snapshots
from ncsn.model.checkpoint import load_for_sampling
from ncsn.training.loop import TrainingJob

POWER = ["train.ema={kind: power}", "train.keep_checkpoints=1"]


def test_a_resumed_training_has_the_same_averages_and_snapshots(
    tiny: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert from_yaml(tiny, overrides=POWER).train.snapshot_every == 10
    monkeypatch.setattr("ncsn.config.training.SNAPSHOTS", 3)  # one at every 53 images
    config = from_yaml(tiny, overrides=POWER)
    runs = [tmp_path / name for name in ("whole", "halves")]
    whole, halves = (TrainingJob(config=config, dataset=dataset, averages=str(run / "ema")) for run in runs)
    outcome = train_locally(whole, runs[0] / "checkpoints")
    train_until_killed(halves, runs[1] / "checkpoints")
    assert snapshots(halves.averages or "") == [64]
    train_locally(halves, runs[1] / "checkpoints")
    places = [run / "checkpoints" / outcome.checkpoint for run in runs]
    assert_same_tensors(*places)
    for file in ("ema_2.safetensors", *(f"../../ema/images-{seen:09d}/0.050.safetensors" for seen in (112, 160))):
        one, other = (load_file(place / file) for place in places)
        assert all(one[name].equal(other[name]) for name in one)
    assert [snapshots(str(run / "ema")) for run in runs] == [[64, 112, 160]] * 2
    built = load_for_sampling(build_average(str(places[0]), relative_width=0.07))
    assert built.images_seen == 160 and built.average is not None and len(built.average["coefficients"]) == 6
