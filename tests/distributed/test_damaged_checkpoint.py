"""A checkpoint that one worker finds damaged: all hear of it, and only what is damaged in the store is given up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing
from gloo_workers import resume_from_a_torn_copy

from ncsn.config import from_yaml
from ncsn.model.checkpoint import DamagedError
from ncsn.model.damaged_checkpoint import remedy
from ncsn.training.context import LocalContext
from ncsn.training.loop import TrainingJob, train_loop

DAMAGE = DamagedError("/tmp/copy", "weights.safetensors differs from its checksum")


@pytest.mark.slow
def test_a_copy_that_is_torn_on_one_worker_ends_all(tiny: str, dataset: str, tmp_path: Path) -> None:
    """None waits for a worker that has ended."""
    job = TrainingJob(config=from_yaml(tiny), dataset=dataset)
    train_loop(TrainingJob(config=job.config, dataset=dataset, stop_at=80), LocalContext(tmp_path / "checkpoints"))
    torch.multiprocessing.spawn(resume_from_a_torn_copy, (2, job, str(tmp_path)), nprocs=2)
    found = {file.name: file.read_text() for file in tmp_path.glob("mistake-*")}
    assert found == dict.fromkeys(("mistake-0", "mistake-1"), DAMAGE.reason)


def test_what_is_whole_in_the_store_is_read_again(tiny: str, dataset: str, tmp_path: Path) -> None:
    assert remedy(str(tmp_path), DAMAGE) == "", "Ray Train has no list yet"
    checkpoints = tmp_path / "checkpoints"
    train_loop(TrainingJob(config=from_yaml(tiny), dataset=dataset), LocalContext(checkpoints))
    snapshot = checkpoints / "checkpoint_manager_snapshot.json"
    snapshot.write_text(json.dumps(as_listed_by_ray("images-000000080", "images-000000160")))
    before = snapshot.read_text()

    told = remedy(str(tmp_path), DAMAGE)
    assert "images-000000160" in told and "weights.safetensors" in told
    assert snapshot.read_text() == before

    (checkpoints / "images-000000160" / "ema.safetensors").unlink()
    told = remedy(str(tmp_path), DAMAGE)
    assert all(fact in told for fact in ("images-000000160", DAMAGE.reason, "images-000000080"))
    assert json.loads(snapshot.read_text()) == as_listed_by_ray("images-000000080")
    assert [path.name for path in checkpoints.glob("images-*")] == ["images-000000080"]


def as_listed_by_ray(*names: str) -> dict[str, Any]:
    """What of Ray Train's list matters here; the list that Ray itself wrote is mended in `test_ray.py`."""
    results = [{"checkpoint_dir_name": name} for name in names]
    indices = list(range(len(names)))
    return {
        "checkpoint_results": results,
        "checkpoint_report_indices": indices,
        "latest_checkpoint_result": results[-1],
    }
