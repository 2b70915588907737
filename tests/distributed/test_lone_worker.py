"""One worker whose checkpoints lie in the store: in rungs, on a disk and on S3, the weights are the same."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load

from ncsn import storage
from ncsn.config import from_yaml
from ncsn.distributed.trainer import StoreContext
from ncsn.training.context import LocalContext
from ncsn.training.loop import TrainingJob, train_loop


def tensors(checkpoint: str) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{key}": tensor
        for name in ("weights", "ema", "optimizer")
        for key, tensor in load(storage.read_bytes(storage.join(checkpoint, f"{name}.safetensors"))).items()
    }


def test_rung_by_rung_is_the_same_as_in_one_go(tiny: str, dataset: str, tmp_path: Path, s3_root: str) -> None:
    """Also where the learning rate falls towards the end: a rung does not shorten its schedule."""
    config = from_yaml(tiny, overrides=["train.checkpoint_every_images=1000"])
    train_loop(TrainingJob(config=config, dataset=dataset), LocalContext(tmp_path / "whole"))
    whole = tensors(str(tmp_path / "whole" / "images-000000160"))
    for root in (str(tmp_path / "rungs"), s3_root):
        names = []
        for stop_at in (40, 80, None):
            job = TrainingJob(config=config, dataset=dataset, stop_at=stop_at)
            names.append(train_loop(job, StoreContext(storage.join(root, "trial"))).checkpoint)
        # 40 is no multiple of the batch size of 16.
        assert names == ["images-000000048", "images-000000080", "images-000000160"]
        assert storage.list_names(storage.join(root, "trial")) == names
        rungs = tensors(storage.join(root, "trial", names[-1]))
        assert whole.keys() == rungs.keys()
        assert all(torch.equal(whole[key], rungs[key]) for key in whole)


def test_a_half_published_checkpoint_is_not_resumed_from(tiny: str, dataset: str, tmp_path: Path) -> None:
    config = from_yaml(tiny)
    folder = tmp_path / "trial"
    train_loop(TrainingJob(config=config, dataset=dataset, stop_at=80), StoreContext(str(folder)))
    half = folder / "images-000000160"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    with StoreContext(str(folder)).latest_checkpoint() as latest:
        assert latest == folder / "images-000000080"
