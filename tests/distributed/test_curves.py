"""What training reports: curves, previews, and the held-out loss, none of which changes the training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from workers import Recorder, assert_same_tensors, train, train_locally

from ncsn.config import Config, from_yaml
from ncsn.config.schema import SamplingConfig
from ncsn.core.losses import Batch
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.training import TrainState
from ncsn.core.training_noise import LevelNoise
from ncsn.data.training_images import open_training_images
from ncsn.errors import InvalidValue
from ncsn.model import build
from ncsn.model.objective import Objective, objective_of
from ncsn.runs.history import RATE, TrainingHistory, held_out_curves, load_history, loss_names
from ncsn.training import held_out, monitor
from ncsn.training.context import WorkerContext
from ncsn.training.held_out import effort_of, open_probe
from ncsn.training.loop import TrainingJob
from ncsn.training.monitor import Curves


@pytest.fixture
def affordable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even the tiny training measures 14 images of both sets."""
    monkeypatch.setattr(held_out, "SHARE", 14 * 4 / (3 * 80))
    monkeypatch.setattr(held_out, "FEW_IMAGES", 7)


def test_curves_add_up_over_batches_to_the_mean_at_each_level():
    values, level = torch.rand(50), torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(0))
    level[level == 2] = 1
    noise, x = LevelNoise(geometric_sigmas(1.0, 0.01, 4)), torch.zeros(50, 1, 1, 1)
    curves = Curves(Objective(noise, lambda *_: None), WorkerContext())
    for part in (slice(0, 20), slice(20, 50)):
        curves.add(Batch(x, noise.sigmas[level], x, level)[part], values[part], torch.zeros(()), images=50)
    point = curves.point()
    found = [point.get(name) for name in loss_names(noise.sigmas.tolist())]
    assert found.pop(2) is None
    wanted = [values[level == index].double().mean().item() for index in (0, 1, 3)]
    assert found == pytest.approx(wanted, rel=1e-12)
    assert point["train/loss"] == pytest.approx(values.double().mean().item(), rel=1e-12)


def point(
    config: Config, dataset: str, context: WorkerContext | None = None, *, swapped: bool = False
) -> dict[str, float]:
    """What a network with random weights measures, perhaps with held-out and training images swapped."""
    state = build.train_state(config)
    generator = torch.Generator().manual_seed(1)
    for weight in state.ema.weights.values():
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    split = open_training_images(dataset)
    probe = open_probe(config, objective_of(config), dataset, split, context or WorkerContext())
    assert probe is not None
    probe = replace(probe, sets=probe.sets[::-1]) if swapped else probe
    return probe.measure(state, dtype=None)


@pytest.mark.usefixtures("affordable")
def test_the_held_out_loss_depends_on_the_weights_and_the_images_only(tiny: str, dataset: str) -> None:
    plain = point(from_yaml(tiny), dataset)
    assert plain.keys() == {"val/loss", "val/gap"}
    trained = point(from_yaml(tiny), dataset, swapped=True)["val/loss"]
    assert plain["val/gap"] == pytest.approx(plain["val/loss"] - trained, rel=1e-6)
    for overrides in (
        ["train.batch_size=5"],
        ["compute.microbatch=2"],
        ["data.horizontal_flip=false", "network.dropout=0.5"],
    ):
        assert point(from_yaml(tiny, overrides=overrides), dataset) == pytest.approx(plain, rel=1e-4)
    one, other = (
        from_yaml(tiny, overrides=["data.horizontal_flip=false", f"data.augmentation={{probability: {probability}}}"])
        for probability in (0.1, 1.0)
    )
    assert point(one, dataset) == point(other, dataset)


def test_the_network_is_told_the_classes_and_cudnn_searches_nothing(tiny, dataset, monkeypatch) -> None:
    def note(_: object, given: object, named: dict[str, torch.Tensor]) -> None:
        seen.append(named["labels"])
        assert not torch.backends.cudnn.benchmark

    monkeypatch.setattr(held_out, "SHARE", 1.0)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    config, seen = from_yaml(tiny, overrides=["data.num_classes=10"]), list[torch.Tensor]()
    network = build.network(config)
    network.register_forward_pre_hook(note, with_kwargs=True)
    monkeypatch.setattr(TrainState, "averaged", lambda _: network)
    point(config, dataset)
    assert set(torch.cat(seen).tolist()) == set(range(10))


@pytest.mark.usefixtures("affordable")
def test_any_number_of_workers_finds_the_same_held_out_loss(tiny: str, dataset: str) -> None:
    class Worker(WorkerContext):
        """The last one knows what the others found."""

        def sum_over_workers(self, tensor: torch.Tensor) -> torch.Tensor:
            found[self.rank].append(tensor.clone())
            summed: torch.Tensor = sum(each[len(found[self.rank]) - 1] for each in found[: self.rank + 1])
            return summed

    config, found = from_yaml(tiny), [list[torch.Tensor]() for _ in range(3)]
    *_, last = (point(config, dataset, Worker(rank=rank, world_size=3)) for rank in range(3))
    assert last == pytest.approx(point(config, dataset), rel=1e-5)


@pytest.mark.usefixtures("affordable")
def test_training_is_that_without_a_held_out_loss_and_previews(tiny, dataset, tmp_path, monkeypatch) -> None:
    def trained(name: str, *overrides: str) -> tuple[TrainingHistory, list[tuple[int, np.ndarray]]]:
        config, sink = from_yaml(tiny, overrides=["network.dropout=0.2", *overrides]), Recorder()
        uri = str(tmp_path / name / "history.json")
        train_locally(TrainingJob(config=config, dataset=dataset, history=uri, sink=sink), tmp_path / name)
        return load_history(uri), sink.pictures

    monkeypatch.setattr(monitor, "SHARE", 1.0)  # so short a training would have no previews
    whole, pictures = trained("whole")
    first, second = (picture for _, picture in pictures)
    measured = [seen for seen, each in zip(whole.images_seen, whole.points, strict=True) if "val/loss" in each]
    assert measured == [seen for seen, _ in pictures] == [80, 160]
    assert first.dtype == np.uint8 and first.shape == second.shape == (6 * 37, 6 * 37, 1)
    assert not np.array_equal(first, second)
    monkeypatch.setattr(held_out, "SHARE", 0.0001)
    without, none = trained("without", "tracking.preview_images=0")
    assert held_out_curves(without) is None and none == []
    for checkpoint in ("images-000000080", "images-000000160"):
        assert_same_tensors(*(tmp_path / name / checkpoint for name in ("whole", "without")))


@pytest.mark.parametrize(
    ("overrides", "held_out_images", "effort"),
    [
        ([], 539, None),  # 160 images in all: any measurement would take longer than the training
        (["train.num_images=100000", "train.checkpoint_every_images=20000"], 539, (150, 150, 20000)),
        (["train.num_images=100000", "train.checkpoint_every_images=20000"], 20, (20, 280, 20000)),
        # 15 images at each checkpoint would tell nothing.
        (["train.num_images=100000", "train.checkpoint_every_images=1000"], 539, (52, 53, 7000)),
        (["train.num_images=10000000", "train.checkpoint_every_images=1000000"], 539, (539, 1000, 1000000)),
        (["train.num_images=100000", "train.checkpoint_every_images=20000"], 0, None),
    ],
)
def test_the_held_out_loss_takes_a_fiftieth_of_the_time(tiny, overrides, held_out_images, effort) -> None:
    config = from_yaml(tiny, overrides=overrides)
    found = effort_of(config, bins=4, held_out=held_out_images, training=1258)
    assert found == effort


@pytest.mark.parametrize(
    ("overrides", "evaluations"),
    [
        ([], 0),  # 16 images x 3 between two checkpoints of 80: more than a hundredth
        (["train.num_images=100000", "train.checkpoint_every_images=100000", "noise.num_levels=50"], 20),
        (["train.num_images=100000", "train.checkpoint_every_images=4000", "noise.num_levels=50"], 7),
        (["noise={num_levels: 1, sigma_1: 0.1, sigma_L: 0.1}", "sampling.sampler={kind: langevin}"], 0),
    ],
)
def test_previews_take_a_hundredth_of_the_time(tiny, overrides, evaluations, monkeypatch) -> None:
    found = []

    def generate(*_: object, sampling: SamplingConfig, **__: object) -> None:
        found.append(sampling.sampler.num_levels)
        assert not torch.backends.cudnn.benchmark
        raise InvalidValue("no images")

    monkeypatch.setattr(monitor, "generate", generate)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    state = SimpleNamespace(averaged=lambda: torch.nn.Linear(1, 1), images_seen=0)
    monitor.preview_png(config=from_yaml(tiny, overrides=overrides), state=state, moments=None)
    assert found == [evaluations] * bool(evaluations)


def test_curves_have_a_point_per_report_and_checkpoint(tiny: str, dataset: str, tmp_path: Path) -> None:
    sink, rare = Recorder(), Recorder()
    train(from_yaml(tiny), dataset, tmp_path / "often", sink)
    train(from_yaml(tiny, overrides=["train.checkpoint_every_images=160"]), dataset, tmp_path / "rare", rare)
    points = dict(sink.points)
    assert list(points) == [32, 64, 80, 96, 128, 160] and [seen for seen, _ in rare.points] == [32, 64, 96, 128, 160]
    parts = (points[80]["train/loss"] + points[96]["train/loss"]) / 2  # of 16 images each
    assert dict(rare.points)[96]["train/loss"] == pytest.approx(parts, rel=1e-5)
    for point in points.values():
        assert {"train/loss", "train/grad_norm_max", RATE} <= point.keys()
        assert 0 <= point["system/cpu_utilization_percentage"] <= 100
        assert 50 < point["system/worker_memory_megabytes"] < point["system/system_memory_usage_megabytes"] + 1e5
        assert list(point)[-1] == "train/learning_rate", "names the series, so it must be in every point"
        levels = [point[key] for key in point if key.startswith("train/loss_sigma_")]
        assert levels and min(levels) <= point["train/loss"] <= max(levels)
    assert points[32]["train/loss"] == pytest.approx(1.0, abs=0.25)  # a fresh U-Net gives a score near zero
