"""Several workers average over gloo: the course of training does not depend on their number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from gloo_workers import resume_from_a_torn_copy, work
from local_training import assert_close_tensors, train_locally

from ncsn.config import from_yaml
from ncsn.model.checkpoint_store import CheckpointStore
from ncsn.runs.history import load_history
from ncsn.training.loop import TrainingJob


@pytest.mark.slow
def test_any_number_of_workers_follows_the_same_curve(tiny: str, dataset: str, tmp_path: Path) -> None:
    def job(folder: Path, *overrides: str) -> TrainingJob:
        folder.mkdir()
        config = from_yaml(tiny, overrides=overrides)
        return TrainingJob(config=config, dataset=dataset, history=str(folder / "history.json"))

    train_locally(job(tmp_path / "1"), tmp_path / "1" / "checkpoints")
    one = load_history(str(tmp_path / "1" / "history.json"))
    for workers, overrides in ((2, ["compute.microbatch=3"]), (3, []), (4, [])):
        folder = tmp_path / str(workers)
        torch.multiprocessing.spawn(work, (workers, job(folder, *overrides), str(folder)), nprocs=workers)
        many = load_history(str(folder / "history.json"))
        assert many.images_seen == one.images_seen
        for name in ("train/loss", "train/grad_norm_max"):
            np.testing.assert_allclose(many.curve(name), one.curve(name), rtol=1e-5)
        names = [name for name in one.points[-1] if name.startswith("train/loss_sigma_")]
        np.testing.assert_allclose(many.losses(names), one.losses(names), rtol=1e-4)
        assert_close_tensors(*(place / "checkpoints" / "images-000000160" for place in (tmp_path / "1", folder)))


@pytest.mark.slow
def test_two_workers_learn_the_weight_of_one(tiny: str, dataset: str, tmp_path: Path) -> None:
    """At any sigma, with a weight that is learned beside the network."""
    config = from_yaml(
        tiny, overrides=["noise={training: {kind: lognormal}}", "loss.weighting=learned", "train.ema={kind: half_life}"]
    )
    train_locally(TrainingJob(config=config, dataset=dataset), tmp_path / "1" / "checkpoints")
    (tmp_path / "2").mkdir()
    job = TrainingJob(config=config, dataset=dataset)
    torch.multiprocessing.spawn(work, (2, job, str(tmp_path / "2")), nprocs=2)
    one, two = (tmp_path / name / "checkpoints" / "images-000000160" for name in "12")
    learned, same = (json.loads((place / "state.json").read_text())["uncertainty"]["weight"] for place in (one, two))
    assert max(map(abs, learned)) > 1e-4
    np.testing.assert_allclose(same, learned, rtol=1e-3, atol=1e-6)
    assert_close_tensors(one, two)


@pytest.mark.slow
def test_a_copy_that_is_torn_on_one_worker_ends_all(tiny: str, dataset: str, tmp_path: Path) -> None:
    """None waits for a worker that has ended, and what is whole in the store stays there."""
    job = TrainingJob(config=from_yaml(tiny), dataset=dataset)
    train_locally(TrainingJob(config=job.config, dataset=dataset, stop_at=80), tmp_path / "checkpoints")
    torch.multiprocessing.spawn(resume_from_a_torn_copy, (2, job, str(tmp_path)), nprocs=2)
    found = {file.name: file.read_text() for file in tmp_path.glob("mistake-*")}
    assert found == dict.fromkeys(("mistake-0", "mistake-1"), "weights.safetensors differs from its checksum")
    assert CheckpointStore(str(tmp_path / "checkpoints")).newest() == "images-000000080"
