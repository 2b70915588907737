"""The held-out loss during training: it changes nothing, and depends on nothing but the weights and the images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from local_training import assert_same_tensors, train_locally

from ncsn.config import Config, from_yaml
from ncsn.data.format import read_split
from ncsn.data.training_images import StreamedSplit, open_training_images
from ncsn.model import build
from ncsn.runs.history import TrainingHistory, held_out_curves, load_history
from ncsn.training import held_out
from ncsn.training.context import WorkerContext
from ncsn.training.held_out import effort_of, open_probe
from ncsn.training.loop import TrainingJob

# A share of the time at which even the tiny training measures 14 images of both sets.
SHARE = 14 * 4 / (3 * 80)


@pytest.fixture
def affordable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "SHARE", SHARE)
    monkeypatch.setattr(held_out, "FEW_IMAGES", 7)


class Worker(WorkerContext):
    """One of several, whose sums are only its own part."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size


class Summing(Worker):
    """The last of several workers, which knows what the others found."""

    def __init__(self, others: list[list[torch.Tensor]]) -> None:
        super().__init__(len(others), len(others) + 1)
        self._others = others

    def sum_over_workers(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + sum(own.pop(0) for own in self._others)


def point(config: Config, dataset: str, context: WorkerContext) -> dict[str, float]:
    """What a network with random weights measures."""
    state = build.train_state(config)
    generator = torch.Generator().manual_seed(1)
    for weight in state.ema.weights.values():
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    training = open_training_images(dataset)
    probe = open_probe(config, dataset, training, context)
    assert probe is not None
    return probe.measure(state, dtype=None)


@pytest.mark.usefixtures("affordable")
@pytest.mark.parametrize(
    "overrides",
    [
        ["train.batch_size=5"],
        ["compute.microbatch=2"],
        ["data.horizontal_flip=false", "network.dropout=0.5"],
        ["seed=0"],
    ],
)
def test_it_depends_on_the_weights_and_the_images_only(tiny: str, dataset: str, overrides: list[str]) -> None:
    plain = point(from_yaml(tiny), dataset, WorkerContext())
    assert plain.keys() == {"val/loss", "val/gap"}
    assert point(from_yaml(tiny, overrides=overrides), dataset, WorkerContext()) == pytest.approx(plain, rel=1e-4)


@pytest.mark.usefixtures("affordable")
def test_images_are_not_augmented(tiny: str, dataset: str) -> None:
    one, other = (
        from_yaml(tiny, overrides=["data.horizontal_flip=false", f"data.augmentation={{probability: {probability}}}"])
        for probability in (0.1, 1.0)
    )
    assert point(one, dataset, WorkerContext()) == point(other, dataset, WorkerContext())


@pytest.mark.usefixtures("affordable")
def test_any_number_of_workers_finds_the_same(tiny: str, dataset: str) -> None:
    class Noting(Worker):
        def sum_over_workers(self, tensor: torch.Tensor) -> torch.Tensor:
            found.append(tensor.clone())
            return tensor

    config, others = from_yaml(tiny), []
    for rank in range(2):
        found: list[torch.Tensor] = []
        point(config, dataset, Noting(rank, 3))
        others.append(found)
    alone = point(config, dataset, WorkerContext())
    assert point(config, dataset, Summing(others)) == pytest.approx(alone, rel=1e-5)


@pytest.mark.usefixtures("affordable")
def test_training_is_that_without_it(tiny: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = from_yaml(tiny, overrides=["network.dropout=0.2"])

    def train(name: str) -> TrainingHistory:
        uri = str(tmp_path / name / "history.json")
        train_locally(TrainingJob(config=config, dataset=dataset, history=uri), tmp_path / name)
        return load_history(uri)

    whole = train("whole")
    assert [seen for seen, each in zip(whole.images_seen, whole.points, strict=True) if "val/loss" in each] == [80, 160]
    monkeypatch.setattr(held_out, "SHARE", 0.0001)
    assert held_out_curves(train("without")) is None
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
def test_it_takes_a_fiftieth_of_the_time(
    tiny: str, overrides: list[str], held_out_images: int, effort: tuple[int, int, int] | None
) -> None:
    config = from_yaml(tiny, overrides=overrides)
    found = effort_of(config, held_out=held_out_images, training=1258)
    assert found == effort
    if found is not None:
        passes = 4 * (found[0] + found[1]) / found[2]
        assert passes <= 0.02 * 3


def test_rows_of_a_streamed_split_are_those_of_the_data(dataset: str) -> None:
    streamed = StreamedSplit(dataset, "test", window_images=64)
    every = read_split(dataset, "test")
    rows = np.random.default_rng(0).permutation(len(every))[:100]
    found = streamed.rows(rows)
    np.testing.assert_array_equal(found.images, every.images[rows])
    np.testing.assert_array_equal(found.labels, every.labels[rows])
