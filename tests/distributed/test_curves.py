"""What the training loop reports: curves, history, and previews."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from local_training import Recorder, train_for_tensors

from ncsn.config import from_yaml
from ncsn.training import monitor


def test_previews_come_with_checkpoints_and_do_not_disturb_the_training(
    tiny: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "SHARE", 1.0)  # so short a training would have none
    with_previews, without = Recorder(), Recorder()
    seen = train_for_tensors(from_yaml(tiny), dataset, tmp_path / "with", with_previews)
    unseen = train_for_tensors(
        from_yaml(tiny, overrides=["tracking.preview_images=0"]), dataset, tmp_path / "without", without
    )
    assert [images for images, _ in with_previews.pictures] == [80, 160]
    assert without.pictures == []
    first, second = (picture for _, picture in with_previews.pictures)
    assert first.dtype == np.uint8 and first.shape == second.shape == (6 * 37, 6 * 37, 1)
    assert not np.array_equal(first, second)
    assert all(torch.equal(seen[key], unseen[key]) for key in seen)


@pytest.mark.parametrize(
    ("overrides", "evaluations"),
    [
        ([], 0),  # 16 images x 3 between two checkpoints of 80: more than a hundredth
        (["train.num_images=100000", "train.checkpoint_every_images=100000", "noise.num_levels=50"], 20),
        (["train.num_images=100000", "train.checkpoint_every_images=100000", "noise.num_levels=4"], 4),
        (["train.num_images=100000", "train.checkpoint_every_images=4000", "noise.num_levels=50"], 7),
        (["train.num_images=100000", "train.checkpoint_every_images=100000", "tracking.preview_images=0"], 0),
        (
            [
                "noise={num_levels: 1, sigma_1: 0.1, sigma_L: 0.1}",
                "sampling.sampler={kind: langevin}",
            ],
            0,
        ),
    ],
)
def test_previews_take_a_hundredth_of_the_time(tiny: str, overrides: list[str], evaluations: int) -> None:
    assert monitor.preview_evaluations(from_yaml(tiny, overrides=overrides)) == evaluations


def test_curves_have_a_point_per_report_and_checkpoint(tiny: str, dataset: str, tmp_path: Path) -> None:
    sink = Recorder()
    train_for_tensors(from_yaml(tiny), dataset, tmp_path, sink)
    assert [seen for seen, _ in sink.points] == [32, 64, 80, 96, 128, 160]
    for _, point in sink.points:
        assert {"train/loss", "train/grad_norm_max", "train/images_per_second"} <= point.keys()
        assert 0 <= point["system/cpu_utilization_percentage"] <= 100
        assert 50 < point["system/worker_memory_megabytes"] < point["system/system_memory_usage_megabytes"] + 1e5
        assert list(point)[-1] == "train/learning_rate", "names the series, so it must be in every point"
        levels = [point[key] for key in point if key.startswith("train/loss_sigma_")]
        assert levels and min(levels) <= point["train/loss"] <= max(levels)
    assert sink.points[0][1]["train/loss"] == pytest.approx(1.0, abs=0.25)  # a fresh U-Net gives a score near zero
