"""Training by one worker in this process, and the tensors of its checkpoints."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load
from torch import Tensor

from ncsn import storage
from ncsn.model.checkpoint_store import CheckpointStore
from ncsn.training.context import LocalContext
from ncsn.training.loop import TrainingJob, TrainOutcome, train_loop


def train_locally(job: TrainingJob, folder: Path | str) -> TrainOutcome:
    """Train, with checkpoints in `folder`."""
    return train_loop(job, LocalContext(), CheckpointStore(str(folder)))


def tensors(checkpoint: Path | str) -> dict[str, Tensor]:
    """Weights, EMA and optimizer of a checkpoint, by file and name."""
    return {
        f"{file}:{name}": tensor
        for file in ("weights", "ema", "optimizer")
        for name, tensor in load(storage.read_bytes(storage.join(str(checkpoint), f"{file}.safetensors"))).items()
    }


def assert_same_tensors(one: Path | str, other: Path | str) -> None:
    """Weights, EMA and optimizer of two checkpoints are equal to the last bit."""
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    assert all(left[name].equal(right[name]) for name in left)
