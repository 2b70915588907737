"""Training that starts from a trained network, or learns from one as consistency tuning does."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from do import do
from refused import refused
from workers import Recorder, assert_same_tensors, tensors, train_locally, train_until_killed

from ncsn.config import Config, ConfigError, changed_settings, from_yaml, to_yaml
from ncsn.core.networks.transfer import light_parameters
from ncsn.data.format import load_manifest
from ncsn.model import build, trained
from ncsn.model.checkpoint import CheckpointStore, load_checkpoint
from ncsn.model.generate import evaluations_per_image, generate
from ncsn.runs.history import HELD_OUT_EDM, LOSS
from ncsn.runs.layout import run_folder
from ncsn.steps.train import start_of
from ncsn.training.context import WorkerContext
from ncsn.training.loop import Training, TrainingJob

CLASSES = ("data.num_classes=10", "noise={sigma_1: 2.0, training: {kind: lognormal}}")
GUIDED = ("loss.pairs=teacher", "loss.guidance={kind: classifier_free, weight: 2.0, sigma_min: 0.05}")
# Three stages of 160 images, whose ends are within batches of 16.
TUNED = (
    *CLASSES, "loss={kind: consistency, q: 2, stages: 3}", "sampling.sampler={kind: consistency}",
    "network.dropout=0.2", "compute.microbatch=5", "train.num_images=160",
)  # fmt: skip


def trained_by(tiny: str, dataset: str, folder: Path, *overrides: str) -> str:
    """URI of a checkpoint."""
    job = TrainingJob(config=from_yaml(tiny, overrides=overrides), dataset=dataset, stop_at=32)
    return f"{folder}/{train_locally(job, folder).checkpoint}"


@pytest.fixture(scope="module")
def source(tiny: str, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained_by(tiny, dataset, tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def teacher(tiny: str, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained_by(tiny, dataset, tmp_path_factory.mktemp("teacher"), *CLASSES, "train.label_dropout=0.1")


def experiment(tiny: str, root: Path, source: str, *overrides: str) -> Config:
    return from_yaml(
        tiny, overrides=[f"storage.root={root}", f"train.init_from={source}", "train.num_images=32", *overrides]
    )


def starting(config: Config, dataset: str, **others: Any) -> TrainingJob:
    uri = start_of(config, run_folder(config, "tuned"), load_manifest(dataset)).uri
    assert uri is not None
    return TrainingJob(config=config, dataset=dataset, start=uri, **others)


def test_before_the_first_step_it_samples_as_the_source(tiny: str, dataset: str, source: str, tmp_path: Path) -> None:
    config = experiment(tiny, tmp_path, source)
    job = starting(config, dataset)
    training = Training(job, WorkerContext(), CheckpointStore(str(tmp_path / "checkpoints")))
    weights = dict(load_checkpoint(source).network.named_parameters())
    for found in (training.state.averaged(), training.state.network):
        assert all(torch.equal(parameter, weights[name]) for name, parameter in found.named_parameters())
    assert training.state.images_seen == 0 and training.state.ema.num_updates == 0
    training.step()
    # Adam's moments are bias-corrected: whatever the gradient, the first step is one learning rate long.
    moved = [(p.detach() - weights[name]).abs().max() for name, p in training.state.network.named_parameters()]
    assert max(map(float, moved)) == pytest.approx(build.learning_rate(config, 0), rel=0.01)


def test_a_light_training_leaves_the_convolutions_and_resumes_as_any(tiny, dataset, source, tmp_path) -> None:
    config = experiment(tiny, tmp_path, source, "train.trainable=light", "train.checkpoint_every_images=16")
    job = starting(config, dataset)
    whole = tmp_path / "whole" / train_locally(job, tmp_path / "whole").checkpoint
    before, after = tensors(source), tensors(whole)
    light = light_parameters(build.network(config))
    moved = {name for name in after if name.startswith("ema:") and not torch.equal(before[name], after[name])}
    assert moved <= {f"ema:{name}" for name in light} and len(moved) > len(light) / 2
    train_locally(replace(job, stop_at=16), tmp_path / "halves")
    again = replace(job, start=str(tmp_path / "gone"))  # a resumed run needs it no more
    assert_same_tensors(tmp_path / "halves" / train_locally(again, tmp_path / "halves").checkpoint, whole)


def test_the_average_of_a_trained_network_has_no_ramp(tiny: str, source: str, tmp_path: Path) -> None:
    ema = "train.ema={kind: half_life, images: 4000, ramp_up: 0.05}"
    ours, other = experiment(tiny, tmp_path, source, ema), from_yaml(tiny, overrides=[ema])
    long = experiment(tiny, tmp_path, source, ema, "train.num_images=80000")
    # Of a short training at most a tenth, or the average would stay where it started.
    for config, images in ((long, 4000), (ours, ours.train.num_images // 10), (other, 0.05 * 16)):
        average = build.new_ema(config, build.network(config))
        assert average.decay(16, 16) == pytest.approx(0.5 ** (16 / images))
    assert "train.init_from" in changed_settings(ours, other)
    with refused("train.trainable", error=ConfigError):
        from_yaml(tiny, overrides=["train.trainable=light"])


def test_the_run_keeps_its_source_and_says_what_differs(tiny: str, dataset: str, source: str, tmp_path: Path) -> None:
    lost = tmp_path / "checkpoints" / Path(source).name
    shutil.copytree(source, lost)
    changed = "network={kind: unet, widths: [8, 8], blocks_per_resolution: 1, embedding_features: 8, sigma_data: 0.4}"
    quick = "train.ema={kind: half_life, images: 1}"
    config = experiment(tiny, tmp_path, str(lost), changed, "data.num_classes=10", quick)
    folder, manifest = run_folder(config, "tuned"), load_manifest(dataset)
    found = start_of(config, folder, manifest)
    assert len(found.notes) == 2 and all("init_from" in note for note in found.notes)  # classes and sigma_data
    assert found.tags == {"ncsn.init_from": f"{lost}/{load_checkpoint(source).digest}"}
    shutil.rmtree(lost)
    assert start_of(config, folder, manifest) == found
    slow = from_yaml(to_yaml(config), overrides=["train.ema={kind: decay, per_step: 0.9999}"])
    assert len(start_of(slow, folder, manifest).notes) == 3, "the average stays with the source"


@pytest.mark.parametrize("overrides", ["network={kind: ncsn, num_features: 4}", "train.init_from=/nowhere/images-1"])
def test_an_unfit_source_is_refused(tiny: str, dataset: str, source: str, tmp_path: Path, overrides: str) -> None:
    config = experiment(tiny, tmp_path, source, overrides)
    with refused("train.init_from"):
        do("train", config, "tuned", dataset=dataset)


def test_consistency_tuning_resumes_bitwise_and_shows_its_own_objective(
    tiny: str, dataset: str, tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(tiny, tmp_path, teacher, *TUNED, *GUIDED, "tracking.preview_images=1")
    sink, previews = Recorder(), set()

    def preview(*given: Any, sampling: Any, **named: Any) -> Any:
        previews.add(sampling.sampler)
        return generate(*given, sampling=sampling, **named)

    monkeypatch.setattr("ncsn.training.monitor.SHARE", 1.0)
    monkeypatch.setattr("ncsn.training.monitor.generate", preview)
    whole = tmp_path / "whole" / train_locally(starting(config, dataset, sink=sink), tmp_path / "whole").checkpoint
    assert previews == {config.sampling.sampler}
    train_until_killed(starting(config, dataset), tmp_path / "halves")
    again = train_locally(starting(config, dataset), tmp_path / "halves").checkpoint
    assert_same_tensors(whole, tmp_path / "halves" / again)
    last = sink.points[-1][1]
    assert 0 < last["train/loss"] < 2 and not {"train/loss_edm", HELD_OUT_EDM, LOSS} & last.keys()
    assert [key for key in last if key.startswith("train/loss_sigma_")]
    tuned = load_checkpoint(str(whole))
    assert evaluations_per_image(tuned.config) == 2
    images = generate(tuned, sampling=tuned.config.sampling, first=0, count=3)
    np.testing.assert_array_equal(images[1:], generate(tuned, sampling=tuned.config.sampling, first=1, count=2))
    plain = starting(experiment(tiny, tmp_path, teacher, *TUNED), dataset)
    unguided = tensors(tmp_path / "plain" / train_locally(plain, tmp_path / "plain").checkpoint)
    assert not all(torch.equal(unguided[name], tensor) for name, tensor in tensors(whole).items())


def test_guidance_is_taught_by_a_score_network_that_knows_classes(tiny, dataset, tmp_path, teacher) -> None:
    never = trained_by(tiny, dataset, tmp_path / "never", *CLASSES)
    blind = trained_by(tiny, dataset, tmp_path / "blind", *CLASSES[1:])
    for name, source, overrides, key in (
        ("guided", teacher, GUIDED, None),
        ("never", never, GUIDED, "loss.guidance"),  # it knows no images without a class
        ("pairs", blind, GUIDED[:1], "loss.pairs"),
        ("blind", blind, (), None),
    ):
        config = experiment(tiny, tmp_path, source, *TUNED, *overrides)
        with nullcontext() if key is None else refused(key):
            start_of(config, run_folder(config, name), load_manifest(dataset))
    frozen = trained.teacher(teacher, config=config, classes=None, device=torch.device("cpu"))
    assert not any([each.training for each in frozen.modules()] + [each.requires_grad for each in frozen.parameters()])
