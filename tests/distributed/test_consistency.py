"""Consistency tuning of a trained network: resumed, and with guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refused import refused
from workers import Recorder, assert_same_tensors, train_locally, train_until_killed

from ncsn.config import Config, from_yaml
from ncsn.model import trained
from ncsn.model.checkpoint import load_checkpoint
from ncsn.model.generate import evaluations_per_image, generate
from ncsn.runs.folder import run_folder
from ncsn.runs.history import HELD_OUT_EDM, LOSS
from ncsn.steps.train import require_start, start_of
from ncsn.training.held_out import load_manifest
from ncsn.training.loop import TrainingJob

CLASSES = ("data.num_classes=10", "noise={sigma_1: 2.0, training: {kind: lognormal}}")
GUIDED = ("loss.pairs=teacher", "loss.guidance={kind: classifier_free, weight: 2.0, sigma_min: 0.05}")
# Three stages of 160 images, whose ends are within batches of 16.
TUNED = (
    *CLASSES, "loss={kind: consistency, q: 2, stages: 3}", "sampling.sampler={kind: consistency}",
    "network.dropout=0.2", "compute.microbatch=5",
)  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tiny: str, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a checkpoint."""
    config = from_yaml(tiny, overrides=[*CLASSES, "train.label_dropout=0.1"])
    return trained_for_a_while(config, dataset, tmp_path_factory.mktemp("teacher"))


def trained_for_a_while(config: Config, dataset: str, folder: Path) -> str:
    return f"{folder}/{train_locally(TrainingJob(config=config, dataset=dataset, stop_at=32), folder).checkpoint}"


def experiment(tiny: str, root: Path, teacher: str, *overrides: str) -> Config:
    return from_yaml(tiny, overrides=[f"storage.root={root}", *TUNED, f"train.init_from={teacher}", *overrides])


def job(config: Config, dataset: str, **others: object) -> TrainingJob:
    start = start_of(config, run_folder(config, "tuned"), load_manifest(dataset)).uri
    return TrainingJob(config=config, dataset=dataset, start=start, **others)  # type: ignore[arg-type]


def test_resume_is_bitwise_and_shows_its_own_objective(tiny, dataset, tmp_path, teacher, monkeypatch) -> None:
    config = experiment(tiny, tmp_path, teacher, *GUIDED, "tracking.preview_images=1")
    sink, previews = Recorder(), set()

    def preview(*given: Any, sampling: Any, **named: Any) -> Any:
        previews.add(sampling.sampler)
        return generate(*given, sampling=sampling, **named)

    monkeypatch.setattr("ncsn.training.monitor.SHARE", 1.0)
    monkeypatch.setattr("ncsn.training.monitor.generate", preview)
    whole = tmp_path / "whole" / train_locally(job(config, dataset, sink=sink), tmp_path / "whole").checkpoint
    assert previews == {config.sampling.sampler}
    train_until_killed(job(config, dataset), tmp_path / "halves")
    again = train_locally(job(config, dataset), tmp_path / "halves").checkpoint
    assert_same_tensors(whole, tmp_path / "halves" / again)
    plain = experiment(tiny, tmp_path, teacher)
    other = tmp_path / "plain" / train_locally(job(plain, dataset), tmp_path / "plain").checkpoint
    weights, unguided = (dict(load_checkpoint(str(each)).network.named_parameters()) for each in (whole, other))
    assert not all(torch.equal(weights[name], unguided[name]) for name in weights)
    last = sink.points[-1][1]
    assert 0 < last["train/loss"] < 2 and not {"train/loss_edm", HELD_OUT_EDM, LOSS} & last.keys()
    assert [key for key in last if key.startswith("train/loss_sigma_")]
    tuned = load_checkpoint(str(whole))
    assert evaluations_per_image(tuned.config) == 2
    images = generate(tuned, sampling=tuned.config.sampling, first=0, count=3)
    np.testing.assert_array_equal(images[1:], generate(tuned, sampling=tuned.config.sampling, first=1, count=2))


def test_guidance_is_taught_by_a_score_network_that_knows_classes(tiny, dataset, tmp_path, teacher) -> None:
    without = trained_for_a_while(from_yaml(tiny, overrides=CLASSES), dataset, tmp_path / "never")
    config = experiment(tiny, tmp_path, without, *GUIDED)
    with refused("loss.guidance"):
        require_start(config, run_folder(config, "tuned"))
    require_start(experiment(tiny, tmp_path, teacher, *GUIDED), run_folder(config, "tuned"))
    blind = trained_for_a_while(from_yaml(tiny, overrides=CLASSES[1:]), dataset, tmp_path / "blind")
    taught = experiment(tiny, tmp_path, blind, "loss.pairs=teacher")
    with refused("loss.pairs"):  # it knows no classes
        require_start(taught, run_folder(config, "tuned"))
    require_start(experiment(tiny, tmp_path, blind), run_folder(config, "tuned"))
    frozen = trained.teacher(teacher, config=config, classes=None, device=torch.device("cpu"))
    assert not any([each.training for each in frozen.modules()] + [each.requires_grad for each in frozen.parameters()])
