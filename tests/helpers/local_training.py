"""Training by one worker in this process, the tensors of its checkpoints, and what it logs."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load
from torch import Tensor

from ncsn import storage
from ncsn.config import Config
from ncsn.model.checkpoint import CheckpointStore
from ncsn.training.context import WorkerContext
from ncsn.training.loop import TrainingJob, TrainOutcome, train_loop


@dataclass
class Recorder:
    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    pictures: list[tuple[int, np.ndarray]] = field(default_factory=list)
    closed: bool = False

    def log(self, metrics: dict[str, float], images_seen: int, when: int, *, png: bytes = b"") -> None:
        if png:
            self.pictures.append((images_seen, np.array(Image.open(io.BytesIO(png)))[..., None]))
        else:
            self.points.append((images_seen, metrics))

    def close(self) -> None:
        self.closed = True


def train_locally(job: TrainingJob, folder: Path | str) -> TrainOutcome:
    return train_loop(job, WorkerContext(), CheckpointStore(str(folder)))


class Killed(BaseException):
    """Nothing after it happens."""


def train_until_killed(job, folder, *, at="", context=None) -> None:
    """Train until a checkpoint is stored: the first, or the one with the name `at`."""

    class Dies(CheckpointStore):
        def publish(self, write: Callable[[Path], None], *, name: str) -> None:
            super().publish(write, name=name)
            self.wait()
            if at in name:
                raise Killed

    with pytest.raises(Killed):
        train_loop(job, context or WorkerContext(), Dies(str(folder)))


def tensors(checkpoint: Path | str) -> dict[str, Tensor]:
    """Weights, EMA and optimizer of a checkpoint, by file and name."""
    return {
        f"{file}:{name}": tensor
        for file in ("weights", "ema", "optimizer")
        for name, tensor in load(storage.read_bytes(storage.join(str(checkpoint), f"{file}.safetensors"))).items()
    }


def train(config: Config, dataset: str, folder: Path, sink: Recorder | None = None) -> Path:
    """Train; the last checkpoint."""
    return folder / train_locally(TrainingJob(config=config, dataset=dataset, sink=sink), folder).checkpoint


def assert_same_tensors(one: Path | str, other: Path | str) -> None:
    """Weights, EMA and optimizer of two checkpoints are equal to the last bit."""
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    assert all(left[name].equal(right[name]) for name in left)


def assert_close_tensors(one: Path | str, other: Path | str, *, rtol: float = 1e-4) -> None:
    """Weights and EMA of two checkpoints are equal to rounding."""
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    for name in left:
        if not name.startswith("optimizer:"):
            assert left[name].allclose(right[name], rtol=rtol, atol=1e-5), name
