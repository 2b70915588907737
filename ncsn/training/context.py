"""What the training loop may know about where it runs."""

from __future__ import annotations

import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from ncsn import storage
from ncsn.model.checkpoint_store import newest_whole

_logger = logging.getLogger(__name__)


class WorkerContext(ABC):
    """One worker among `world_size`; rank 0 writes, all ranks call every method equally often."""

    rank: int
    world_size: int
    device: torch.device

    def share(self, batch_size: int) -> range:
        """This worker's places in a global batch; shares differ by one image where the workers do not divide it."""
        return range(batch_size * self.rank // self.world_size, batch_size * (self.rank + 1) // self.world_size)

    @contextmanager
    def mistakes_shared(self) -> Iterator[None]:
        """Context manager: a ValueError that one worker raises in the block is raised by all. A barrier at its end.

        A mistake ends its worker without a failure that Ray would see, so the others would wait for it in vain.
        """
        yield

    def preempted(self) -> bool:
        """Whether a machine of the workers is about to be taken away, the same on every worker. A barrier."""
        return False

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
    def publish(self, write: Callable[[Path], None] | None, *, name: str, loss: float | None) -> None:
        """Make what rank 0 writes the latest checkpoint under `name`, now or soon, but before the worker returns.

        A barrier. Other ranks pass None.

        Args:
            write: Writes a complete checkpoint into an empty local folder, from any thread.
            name: Name of the checkpoint.
            loss: Loss since the checkpoint before, the same on each rank; None keeps it out of the choice of the best.
        """


class LocalContext(WorkerContext):
    """A single worker without Ray, for tests, benchmarks and use as a library.

    Args:
        checkpoints: Folder that receives the checkpoints; the last whole one by name is resumed from.
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

    def latest_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The last whole folder, by name."""
        return newest_whole(
            sorted(path.name for path in self.checkpoints.glob("images-*")),
            opened=lambda name: nullcontext(self.checkpoints / name),
            delete=lambda name: shutil.rmtree(self.checkpoints / name),
        )

    def publish(self, write: Callable[[Path], None] | None, *, name: str, loss: float | None) -> None:  # noqa: ARG002
        """Write beside the checkpoints, and rename into place."""
        assert write is not None
        with storage.scratch_folder(str(self.checkpoints)) as folder:
            write(folder)
            folder.rename(self.checkpoints / name)
