"""What the training loop may know about where it runs."""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class WorkerContext(ABC):
    """One worker among `world_size`; rank 0 writes, all ranks call every method equally often."""

    rank: int
    world_size: int
    device: torch.device

    def share(self, batch_size: int) -> range:
        """This worker's places in a global batch; shares differ by one image where the workers do not divide it."""
        return range(batch_size * self.rank // self.world_size, batch_size * (self.rank + 1) // self.world_size)

    @abstractmethod
    def wrap(self, network: nn.Module) -> nn.Module:
        """Network whose gradients are averaged over the workers."""

    @abstractmethod
    def sum_over_workers(self, tensor: Tensor) -> Tensor:
        """`tensor` added up over all workers, the same on each."""

    @abstractmethod
    def latest_checkpoint(self) -> AbstractContextManager[Path | None]:
        """Context manager: local folder of the checkpoint to resume from, or None."""

    @abstractmethod
    def publish(self, folder: Path | None, *, name: str, metrics: dict[str, Any]) -> None:
        """Make rank 0's `folder` the latest checkpoint under `name`. A barrier; other ranks pass None."""


class LocalContext(WorkerContext):
    """A single worker without Ray, for tests, benchmarks and use as a library.

    Args:
        checkpoints: Folder that receives the checkpoints; the last by name is resumed from.
        device: Where to compute.
    """

    rank = 0
    world_size = 1

    def __init__(self, checkpoints: Path, *, device: str = "cpu") -> None:
        self.checkpoints = checkpoints
        self.device = torch.device(device)

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network itself."""
        return network

    def sum_over_workers(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """The last folder, by name."""
        folders = sorted(self.checkpoints.glob("images-*")) if self.checkpoints.is_dir() else []
        yield folders[-1] if folders else None

    def publish(self, folder: Path | None, *, name: str, metrics: dict[str, Any]) -> None:  # noqa: ARG002
        """Copy the folder, renamed into place."""
        assert folder is not None
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.checkpoints))
        shutil.copytree(folder, staging, dirs_exist_ok=True)
        staging.rename(self.checkpoints / name)
