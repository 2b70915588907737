"""Consistency tuning of a trained network: resumed, by several workers, with guidance, and from a run by its name."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from refused import refused
from workers import Recorder, assert_close_tensors, assert_same_tensors, train_locally, train_until_killed, work

from ncsn import storage
from ncsn.config import Config, from_yaml, to_yaml
from ncsn.data.training_images import open_training_images
from ncsn.model import trained
from ncsn.model.checkpoint import load_checkpoint
from ncsn.model.generate import evaluations_per_image, generate
from ncsn.model.objective import objective_of
from ncsn.runs.folder import run_folder, update_step
from ncsn.runs.history import HELD_OUT_EDM, LOSS
from ncsn.steps.train import require_start, start_of
from ncsn.training.batches import draw_batch
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


def test_resume_is_bitwise_and_shows_its_own_objective(
    tiny: str, dataset: str, tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, sink, previews = (
        experiment(tiny, tmp_path, teacher, *GUIDED, "tracking.preview_images=1"),
        Recorder(),
        set(),
    )

    def preview(*given: Any, sampling: Any, **named: Any) -> Any:
        previews.add(sampling.sampler)
        return generate(*given, sampling=sampling, **named)

    monkeypatch.setattr("ncsn.training.monitor.SHARE", 1.0)
    monkeypatch.setattr("ncsn.training.monitor.generate", preview)
    whole = tmp_path / "whole" / train_locally(job(config, dataset, sink=sink), tmp_path / "whole").checkpoint
    assert previews == {config.sampling.sampler}
    train_until_killed(job(config, dataset), tmp_path / "halves")
    assert_same_tensors(
        whole, tmp_path / "halves" / train_locally(job(config, dataset), tmp_path / "halves").checkpoint
    )
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


def test_a_pair_is_a_function_of_the_images_place(tiny: str, dataset: str, tmp_path: Path) -> None:
    config = experiment(tiny, tmp_path, "anything")
    draw = partial(draw_batch, config, objective_of(config), open_training_images(dataset))
    whole = draw(first=48, count=16)
    assert whole.lower is not None and whole.lower[6:9].equal(draw(first=54, count=3).lower)
    shares = (whole.lower / whole.sigma)[whole.lower > 0]
    assert len(shares) > 0 and (whole.lower < whole.sigma).all() and objective_of(from_yaml(tiny)).pairs is None


@pytest.mark.slow
def test_two_workers_learn_as_one(tiny: str, dataset: str, tmp_path: Path, teacher: str) -> None:
    config = experiment(tiny, tmp_path, teacher, *GUIDED)
    train_locally(job(config, dataset), tmp_path / "1" / "checkpoints")
    (tmp_path / "2").mkdir()
    torch.multiprocessing.spawn(work, (2, job(config, dataset), str(tmp_path / "2")), nprocs=2)
    assert_close_tensors(*(tmp_path / name / "checkpoints" / "images-000000160" for name in "12"))


def test_it_starts_from_a_run_by_its_name(tiny: str, dataset: str, tmp_path: Path, teacher: str) -> None:
    config = experiment(tiny, tmp_path, "digits-edm")
    folder = run_folder(config, "digits-edm")
    for _ in range(2):
        with refused("train.init_from") as caught:
            require_start(config, run_folder(config, "tuned"))
        assert "--run digits-edm" in caught.value.problems[0].hint
        storage.write_text(folder.config, to_yaml(load_checkpoint(teacher).config))  # a run that is not trained
    update_step(folder, "train", state="FINISHED", result={"checkpoint": teacher}, finished_at="2026-01-01T00:00:00")
    require_start(config, run_folder(config, "tuned"))
    found = start_of(config, run_folder(config, "tuned"), load_manifest(dataset))
    assert found.tags == {"ncsn.init_from": f"{teacher}/{load_checkpoint(teacher).digest}"}


def test_guidance_is_taught_by_a_score_network_that_knows_classes(
    tiny: str, dataset: str, tmp_path: Path, teacher: str
) -> None:
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
