"""Training through failures of weights, disk and checkpoints, each against the run that nothing disturbed."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from refused import refused
from workers import assert_same_tensors, curves, train_locally

from ncsn.config import Config, from_yaml
from ncsn.training.loop import DivergedError, Training, TrainingJob, TrainOutcome

LAST = "images-000000160"


def run(folder: Path, config: Config, dataset: str) -> TrainOutcome:
    job = TrainingJob(config=config, dataset=dataset, history=str(folder / "history.json"))
    return train_locally(job, folder / "checkpoints")


def assert_same(one: Path, other: Path) -> None:
    """Weights, EMA, optimizer and curves are equal to the last bit."""
    assert_same_tensors(one / "checkpoints" / LAST, other / "checkpoints" / LAST)
    assert curves(str(one)) == curves(str(other))


@pytest.fixture(scope="module")
def whole(tiny: str, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, from_yaml(tiny), dataset)
    assert [seen for seen, _ in curves(str(folder))["train/loss"]] == [32, 64, 80, 96, 128, 160]
    return folder


def test_a_nan_ends_training_and_is_forgotten_by_the_same_command(whole, tiny, dataset, tmp_path, monkeypatch) -> None:
    step = Training.step

    def broken(training: Training) -> None:
        if training.state.images_seen == 96:
            with torch.no_grad():
                next(training.state.network.parameters()).fill_(math.nan)
        step(training)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", broken)
        with refused("optimizer.learning_rate", error=DivergedError) as caught:
            run(tmp_path, from_yaml(tiny), dataset)
    assert all(fact in str(caught.value) for fact in ("loss nan", "images_seen = 128", "images-000000080"))
    run(tmp_path, from_yaml(tiny), dataset)
    assert_same(whole, tmp_path)


@pytest.mark.parametrize("name", ["weights.safetensors", "checkpoint.json"])
def test_the_checkpoint_before_a_damaged_one_is_used_and_named(whole, tiny, dataset, tmp_path, caplog, name) -> None:
    run(tmp_path, from_yaml(tiny), dataset)
    damaged = tmp_path / "checkpoints" / LAST / name
    damaged.write_bytes(damaged.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        run(tmp_path, from_yaml(tiny), dataset)
    assert LAST in caplog.text and name in caplog.text
    assert_same(whole, tmp_path)
