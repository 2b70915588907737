"""The worker context on Ray Train."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ncsn.distributed.worker_context import WorkerContext

# All buffers are constants. Torch 2.13 renamed the argument that says so.
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}


class RayContext(WorkerContext):
    """A worker of a Ray `TorchTrainer`: gloo on CPUs, NCCL on GPUs."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network under DistributedDataParallel, if there is more than one worker."""
        if self.world_size == 1:
            return network
        # For 1x1 convolutions two kinds of strides name one layout in memory, so what this warns of does not happen.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        return DistributedDataParallel(network, gradient_as_bucket_view=True, **_NO_BUFFER_SYNC)

    def sum_over_workers(self, tensor: Tensor) -> Tensor:
        """All-reduce."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """The latest checkpoint that Ray Train has registered in the run's storage."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def publish(self, folder: Path | None, *, name: str, metrics: dict[str, Any]) -> None:
        """Upload through Ray Train, which registers the checkpoint once it is complete."""
        checkpoint = ray.train.Checkpoint.from_directory(folder) if folder else None
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name)
