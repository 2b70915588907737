"""The worker context on Ray Train.

Checkpoints go to the store in the background, while training goes on: Ray Train calls the upload from a thread, waits
for it before a worker is done, and restarts the group if it fails.
"""

from __future__ import annotations

import inspect
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ncsn import storage
from ncsn.model import checkpoint
from ncsn.model.checkpoint_store import BestCheckpoint
from ncsn.training.context import WorkerContext

# All buffers are constants. Torch 2.13 renamed the argument that says so.
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}


class RayContext(WorkerContext):
    """A worker of a Ray `TorchTrainer`: gloo on CPUs, NCCL on GPUs.

    Args:
        checkpoints: URI of the folder that Ray Train keeps its checkpoints in.
        best: What keeps the best checkpoint, or None.
    """

    def __init__(self, checkpoints: str, *, best: BestCheckpoint | None = None) -> None:
        context = ray.train.get_context()
        self.uri, self._best, self._storing = checkpoints, best, threading.Lock()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.rank == 0 and storage.is_local(checkpoints):
            storage.remove_scratch(checkpoints)

    @contextmanager
    def mistakes_shared(self) -> Iterator[None]:
        """Every worker tells the others how it fared; of several mistakes that of the lowest rank is raised."""
        own: ValueError | None = None
        try:
            yield
        except ValueError as mistake:
            own = mistake
        told = [own] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(told, own)
        for each in told:
            if each is not None:
                raise each

    def preempted(self) -> bool:
        """Whether Ray is draining a node that hosts a worker, as autoscalers and `ray drain-node` do before its end."""
        return ray.train.get_preemption_info() is not None

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
        latest = ray.train.get_checkpoint()
        if latest is None:
            yield None
            return
        with latest.as_directory() as folder:
            yield Path(folder)

    def publish(self, write: Callable[[Path], None] | None, *, name: str, loss: float | None) -> None:
        """Begin to write and store; Ray Train registers the checkpoint once it is complete.

        Waits if the checkpoint before is still on its way, so that a slow store does not fill this machine's memory.
        """
        with self._storing:
            pass
        # A folder from which publishing is a move, if the store is a disk.
        folder = storage.new_scratch(self.uri) if write is not None else None

        def store(local: ray.train.Checkpoint, stored_as: str) -> ray.train.Checkpoint:
            assert write is not None
            return self._store(write, Path(local.path), stored_as, loss=loss)

        ray.train.report(
            {} if loss is None else {"loss": loss},
            checkpoint=ray.train.Checkpoint.from_directory(folder) if folder else None,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,  # `_store` does
            checkpoint_upload_fn=store,
        )

    def _store(
        self, write: Callable[[Path], None], folder: Path, name: str, *, loss: float | None
    ) -> ray.train.Checkpoint:
        """Publish; what a lost attempt has published, and Ray Train not registered, is replaced by the same."""
        target = storage.join(self.uri, name)
        with self._storing:
            try:
                write(folder)
                storage.publish_folder(folder, target, marker=checkpoint.INDEX, replace=True)
                if self._best is not None and loss is not None:
                    self._best.offer(Path(target) if storage.is_local(target) else folder, name=name, loss=loss)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        filesystem, path = storage.filesystem(target)
        return ray.train.Checkpoint(path, filesystem)
