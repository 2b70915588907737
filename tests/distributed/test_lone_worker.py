"""One worker with its checkpoints in the store: in rungs, on a disk and on S3, the weights are the same."""

from __future__ import annotations

from pathlib import Path

import torch
from local_training import train_locally
from safetensors.torch import load

from ncsn import storage
from ncsn.config import from_yaml
from ncsn.training.loop import TrainingJob


def tensors(checkpoint: str) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{key}": tensor
        for name in ("weights", "ema", "optimizer")
        for key, tensor in load(storage.read_bytes(storage.join(checkpoint, f"{name}.safetensors"))).items()
    }


def test_rung_by_rung_is_the_same_as_in_one_go(tiny: str, dataset: str, tmp_path: Path, s3_root: str) -> None:
    """Also where the learning rate falls towards the end: a rung does not shorten its schedule."""
    config = from_yaml(tiny, overrides=["train.checkpoint_every_images=1000"])
    train_locally(TrainingJob(config=config, dataset=dataset), tmp_path / "whole")
    whole = tensors(str(tmp_path / "whole" / "images-000000160"))
    for root in (str(tmp_path / "rungs"), s3_root):
        names = []
        for stop_at in (40, 80, None):
            job = TrainingJob(config=config, dataset=dataset, stop_at=stop_at)
            names.append(train_locally(job, storage.join(root, "trial")).checkpoint)
        # 40 is no multiple of the batch size of 16.
        assert names == ["images-000000048", "images-000000080", "images-000000160"]
        assert storage.list_names(storage.join(root, "trial")) == names
        rungs = tensors(storage.join(root, "trial", names[-1]))
        assert whole.keys() == rungs.keys()
        assert all(torch.equal(whole[key], rungs[key]) for key in whole)
