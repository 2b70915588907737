"""Where the training loop runs: one worker among several."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WorkerContext(ABC):
    """One worker among `world_size`. All call the same methods in the same order; rank 0 writes."""

    rank: int
    world_size: int
    device: torch.device

    def share(self, batch_size: int) -> range:
        """This worker's places in a global batch; shares differ by at most one image."""
        return range(batch_size * self.rank // self.world_size, batch_size * (self.rank + 1) // self.world_size)

    @contextmanager
    def mistakes_shared(self) -> Iterator[None]:
        """Context manager: a ValueError that one worker raises in the block is raised by all. A barrier at its end."""
        # Such an error is no failure for Ray, so the others would wait for this worker forever.
        yield

    def preempted(self) -> bool:
        """Whether a machine of the workers is about to be preempted, the same on every worker. A barrier."""
        return False

    @abstractmethod
    def wrap(self, network: nn.Module) -> nn.Module:
        """The network, with gradients averaged over the workers."""

    @abstractmethod
    def sum_over_workers(self, tensor: Tensor) -> Tensor:
        """The sum of the workers' tensors, the same on each."""


class LocalContext(WorkerContext):
    """A single worker."""

    rank = 0
    world_size = 1

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network itself."""
        return network

    def sum_over_workers(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor
