"""Training by one worker in this process."""

from __future__ import annotations

from pathlib import Path

from ncsn.model.checkpoint_store import CheckpointStore
from ncsn.training.context import LocalContext
from ncsn.training.loop import TrainingJob, TrainOutcome, train_loop


def train_locally(job: TrainingJob, folder: Path | str) -> TrainOutcome:
    """Train, with checkpoints in `folder`."""
    return train_loop(job, LocalContext(), CheckpointStore(str(folder)))
