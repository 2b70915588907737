"""Training with classes: which labels the network sees, what it learns from them, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from local_training import tensors, train_locally
from refused import refused

from ncsn.config import Config, from_yaml
from ncsn.data.format import load_manifest
from ncsn.data.training_images import open_training_images
from ncsn.model import build, checkpoint
from ncsn.model.classes import Classes
from ncsn.steps import train as train_step
from ncsn.training import held_out
from ncsn.training.context import WorkerContext
from ncsn.training.held_out import open_probe
from ncsn.training.loop import TrainingJob

CLASSES = ("data.num_classes=10", "train.label_dropout=0.3", "network.dropout=0.1")


@pytest.fixture
def config(tiny: str) -> Config:
    return from_yaml(tiny, overrides=CLASSES)


def test_the_network_learns_from_every_class(config: Config, dataset: str, tmp_path: Path) -> None:
    train_locally(TrainingJob(config=config, dataset=dataset), tmp_path)
    start, end = (tensors(tmp_path / name) for name in ("images-000000080", "images-000000160"))
    manifest = load_manifest(dataset)
    found = checkpoint.load_checkpoint(str(tmp_path / "images-000000160"))
    assert found.classes == Classes(tuple(manifest.class_names), tuple(manifest.class_counts["train"]))
    (weight,) = (name for name in end if name.startswith("weights:") and name.endswith("map_label.weight"))
    # Adam moves each weight that has a gradient.
    assert (start[weight] != end[weight]).any(dim=0).all()


def test_the_held_out_loss_tells_the_network_the_classes(
    config: Config, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "SHARE", 1.0)
    monkeypatch.setattr(held_out, "FEW_IMAGES", 10)
    training, state = open_training_images(dataset), build.train_state(config)
    seen: list[torch.Tensor] = []
    network = build.network(config)
    network.register_forward_pre_hook(lambda _, given, named: seen.append(named["labels"]), with_kwargs=True)
    monkeypatch.setattr(state, "averaged", lambda: network)
    probe = open_probe(config, dataset, training, WorkerContext())
    assert probe is not None
    probe.measure(state, dtype=None)
    labels = torch.cat(seen)
    assert set(labels.tolist()) == set(range(10))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["data.num_classes=9"], "data.num_classes"),
        (["sampling.label=ten"], "sampling.label"),
        (["sampling.label=10"], "sampling.label"),
    ],
)
def test_classes_that_the_images_do_not_have_are_refused(
    tiny: str, dataset: str, tmp_path: Path, overrides: list[str], key: str
) -> None:
    config = from_yaml(tiny, overrides=["data.num_classes=10", f"storage.root={tmp_path}", *overrides])
    with refused(key) as caught:
        train_step.run(config, run="classes", dataset=dataset)
    (problem,) = caught.value.problems
    names = problem.hint if key == "sampling.label" else problem.reason
    assert all(name in names for name in load_manifest(dataset).class_names)
