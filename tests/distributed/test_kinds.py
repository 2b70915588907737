"""Each loss, noise and kind of images that a config can choose: it trains, and resumes to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from do import do
from refused import refused
from tiny_networks import shaken
from workers import assert_same_tensors, tensors, train, train_locally, train_until_killed

from ncsn.config import from_yaml
from ncsn.data.format import load_manifest
from ncsn.data.training_images import open_cache
from ncsn.model import build, checkpoint
from ncsn.model.classes import Classes
from ncsn.model.objective import objective_of
from ncsn.runs.history import EDM_LOSS, HELD_OUT_EDM, load_history, loss_names
from ncsn.training import held_out
from ncsn.training.batches import draw_batch
from ncsn.training.loop import TrainingJob

SSM = "loss={kind: ssm}"
ANY_SIGMA = "noise={sigma_1: 8.0, sigma_L: 0.01, num_levels: 6, training: {kind: lognormal, mean: -1.37}}"
CLASSES = ("data.num_classes=10", "train.label_dropout=0.3", "network.dropout=0.1")
KINDS = {
    "ssm": (SSM, ANY_SIGMA),
    "one": (
        "loss={kind: dsm, anneal_power: 0}",
        "noise={sigma_1: 0.1, sigma_L: 0.1, num_levels: 1}",
        "network={kind: ncsn, num_features: 4}",
        "sampling.sampler={kind: langevin, num_steps: 3, step_size: 1.0e-4}",
    ),
    "learned": (ANY_SIGMA, "loss.weighting=learned", "train.ema={kind: half_life}", "network.dropout=0.1"),
    "augmented": (
        "data.horizontal_flip=false",
        "data.augmentation={probability: 0.5}",
        "noise.training={kind: lognormal}",
        "network={kind: ddpmpp, base_width: 8, multipliers: [1, 1], blocks_per_resolution: 1, attention_sizes: []}",
        "loss={weighting: edm}",
        "compute.microbatch=5",
    ),
    "classes": CLASSES,
}


@pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("window", [64 * 64, 1 << 30], ids=["streamed", "whole"])
def test_resume_is_bitwise(overrides, window, tiny, dataset, tmp_path, monkeypatch) -> None:
    """6 steps = 3 + resume + 3, for each loss and each way to read the images."""
    monkeypatch.setattr("ncsn.data.training_images.WINDOW_BYTES", window)
    short = ("train.num_images=96", "optimizer.decay=constant")
    config = from_yaml(tiny, overrides=[*overrides, *short])
    whole = train(config, dataset, tmp_path / "whole")
    halves = from_yaml(tiny, overrides=[*overrides, *short, "train.checkpoint_every_images=48"])
    train_until_killed(TrainingJob(config=halves, dataset=dataset), tmp_path / "halves")
    second = train(config, dataset, tmp_path / "halves")
    assert (tmp_path / "halves" / "images-000000048").is_dir()
    assert_same_tensors(whole, second)


@pytest.mark.parametrize(
    "network",
    [
        "{kind: unet, widths: [8], embedding_features: 8, attention_sizes: [8], dropout: 0.1}",
        "{kind: ddpmpp, base_width: 8, multipliers: [1], blocks_per_resolution: 1, attention_sizes: [], dropout: 0.1}",
        "{kind: ncsn, num_features: 4}",
    ],
)
def test_sliced_score_matching_differentiates_every_network_twice(network: str, tiny: str, dataset: str) -> None:
    config = from_yaml(tiny, overrides=[SSM, f"network={network}"])
    trained, objective = shaken(build.network(config)), objective_of(config)
    batch = draw_batch(config, objective, open_cache(dataset, "train"), first=0, count=4)
    objective.loss(None, None)(trained, batch.on(torch.device("cpu"), config)).loss.sum().backward()
    gradients = [parameter.grad for parameter in trained.parameters()]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize(
    ("overrides", "weights"),  # at sigma = 2, of the held-out loss and of Karras et al.
    [
        (["loss={weighting: edm}"], [17, None]),
        ([ANY_SIGMA, "loss={weighting: learned}"], [17, 17]),
        ([ANY_SIGMA, "loss={kind: ssm, anneal_power: 3}"], [2, 17]),
        (
            [ANY_SIGMA, "loss={kind: consistency, from_scratch: true}", "sampling.sampler={kind: consistency}"],
            [None, None],
        ),
    ],
)
def test_an_objective_weighs_its_losses(tiny: str, overrides: list[str], weights: list[float | None]) -> None:
    found = objective_of(from_yaml(tiny, overrides=[*overrides, "network.sigma_data=0.5"]))
    assert [each and each(torch.tensor(2.0)) for each in (found.weight, found.edm_weight)] == weights


def test_curves_at_any_sigma_are_by_bin(tiny, dataset, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(held_out, "SHARE", 1.0)
    monkeypatch.setattr(held_out, "FEW_IMAGES", 10)
    config = from_yaml(tiny, overrides=[ANY_SIGMA, "network.sigma_data=0.42", "loss={kind: dsm, weighting: edm}"])
    uri = str(tmp_path / "history.json")
    train_locally(TrainingJob(config=config, dataset=dataset, history=uri), tmp_path)
    history, names = load_history(uri), loss_names(objective_of(config).noise.bins.tolist())
    found = {name for point in history.points for name in point if "loss_sigma_" in name}
    assert len(set(names)) == 10 and found == set(names)
    assert history.curve(EDM_LOSS)[-1] < history.curve(EDM_LOSS)[0] and np.isfinite(history.curve(HELD_OUT_EDM)[-1])


def test_the_network_learns_from_every_class(tiny: str, dataset: str, tmp_path: Path) -> None:
    train_locally(TrainingJob(config=from_yaml(tiny, overrides=CLASSES), dataset=dataset), tmp_path)
    start, end = (tensors(tmp_path / name) for name in ("images-000000080", "images-000000160"))
    manifest = load_manifest(dataset)
    found = checkpoint.load_checkpoint(str(tmp_path / "images-000000160"))
    assert found.classes == Classes(tuple(manifest.class_names), tuple(manifest.class_counts["train"]))
    (weight,) = (name for name in end if name.startswith("weights:") and name.endswith("map_label.weight"))
    # Adam moves each weight that has a gradient.
    assert (start[weight] != end[weight]).any(dim=0).all()


@pytest.mark.parametrize(("setting", "words"), [("data.num_classes=9", "reason"), ("sampling.label=ten", "hint")])
def test_classes_that_the_images_do_not_have_are_refused(tiny, dataset, tmp_path, setting, words) -> None:
    config = from_yaml(tiny, overrides=["data.num_classes=10", f"storage.root={tmp_path}", setting])
    with refused(setting.partition("=")[0]) as caught:
        do("train", config, "classes", dataset=dataset)
    assert all(name in getattr(caught.value.problems[0], words) for name in load_manifest(dataset).class_names)
