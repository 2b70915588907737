"""Training with classes: which labels the network sees, what it learns from them, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from local_training import assert_same_tensors, tensors, train_locally
from refused import refused

from ncsn.config import Config, from_yaml
from ncsn.core.keyed_random import Stream, keyed_uniform
from ncsn.data.format import load_manifest
from ncsn.data.training_images import image_indices, open_cache, open_training_images
from ncsn.model import build, checkpoint
from ncsn.model.classes import Classes
from ncsn.steps import train as train_step
from ncsn.training import held_out
from ncsn.training.batches import draw_batch
from ncsn.training.context import LocalContext
from ncsn.training.held_out import open_probe
from ncsn.training.loop import TrainingJob

CLASSES = ("data.num_classes=10", "train.label_dropout=0.3", "network.dropout=0.1")


@pytest.fixture
def config(tiny: str) -> Config:
    return from_yaml(tiny, overrides=CLASSES)


def test_a_label_belongs_to_the_place_of_its_image(config: Config, dataset: str) -> None:
    split = open_cache(dataset, "train")
    whole = draw_batch(config, split, first=1250, count=64)
    parts = [draw_batch(config, split, first=1250 + 16 * rank, count=16) for rank in range(4)]
    labels = whole.conditions["labels"]
    assert torch.equal(labels, torch.cat([part.conditions["labels"] for part in parts]))
    assert torch.equal(whole[3:7].inputs["labels"], labels[3:7])
    rows = image_indices(config.seed, first=1250, count=64, size=len(split))
    hidden = keyed_uniform(config.seed, stream=Stream.LABEL, first=1250, count=64, size=1)[:, 0].numpy() < 0.3
    np.testing.assert_array_equal(labels, np.where(hidden, -1, split.labels[rows]))
    assert 0 < hidden.sum() < 64


@pytest.mark.parametrize("window", [64 * 64, 1 << 30], ids=["windows", "whole"])
def test_a_resumed_training_is_the_same(
    tiny: str, dataset: str, tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ncsn.data.training_images.WINDOW_BYTES", window)
    config = from_yaml(tiny, overrides=CLASSES)
    job = TrainingJob(config=config, dataset=dataset)
    train_locally(job, tmp_path / "whole")
    train_locally(TrainingJob(config=config, dataset=dataset, stop_at=80), tmp_path / "halves")
    train_locally(job, tmp_path / "halves")
    last = "images-000000160"
    assert_same_tensors(tmp_path / "whole" / last, tmp_path / "halves" / last)
    found = checkpoint.load_for_sampling(str(tmp_path / "whole" / last))
    manifest = load_manifest(dataset)
    assert found.classes == Classes(tuple(manifest.class_names), tuple(manifest.class_counts["train"]))
    start, end = (tensors(tmp_path / "whole" / name) for name in ("images-000000080", last))
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
    probe = open_probe(config, dataset, training, LocalContext())
    assert probe is not None
    probe.measure(state, dtype=None)
    labels = torch.cat(seen)
    assert set(labels.tolist()) == set(range(10))


def test_old_configs_train_networks_without_classes(tiny: str, dataset: str) -> None:
    config = from_yaml(tiny)
    assert draw_batch(config, open_cache(dataset, "train"), first=0, count=4).conditions == {}
    assert not [name for name, _ in build.network(config).named_parameters() if "label" in name]


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
