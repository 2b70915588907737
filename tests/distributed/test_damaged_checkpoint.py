"""A checkpoint that reaches one of several workers damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.multiprocessing
from gloo_workers import resume_from_a_torn_copy
from local_training import train_locally

from ncsn.config import from_yaml
from ncsn.model.checkpoint_store import CheckpointStore
from ncsn.training.loop import TrainingJob


@pytest.mark.slow
def test_a_copy_that_is_torn_on_one_worker_ends_all(tiny: str, dataset: str, tmp_path: Path) -> None:
    """None waits for a worker that has ended, and what is whole in the store stays there."""
    job = TrainingJob(config=from_yaml(tiny), dataset=dataset)
    train_locally(TrainingJob(config=job.config, dataset=dataset, stop_at=80), tmp_path / "checkpoints")
    torch.multiprocessing.spawn(resume_from_a_torn_copy, (2, job, str(tmp_path)), nprocs=2)
    found = {file.name: file.read_text() for file in tmp_path.glob("mistake-*")}
    assert found == dict.fromkeys(("mistake-0", "mistake-1"), "weights.safetensors differs from its checksum")
    assert CheckpointStore(str(tmp_path / "checkpoints")).newest() == "images-000000080"
