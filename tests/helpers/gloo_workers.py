"""Training by several processes that average over gloo as Ray's workers do, without Ray around them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed

from ncsn.distributed.ray_context import RayContext
from ncsn.distributed.worker_context import LocalContext
from ncsn.distributed.worker_loop import TrainingJob, train_loop


class GlooContext(RayContext):
    """Ray's worker in what it computes; its checkpoints are those of a worker alone."""

    def __init__(self, rank: int, world_size: int, checkpoints: Path) -> None:
        self.rank, self.world_size, self.device = rank, world_size, torch.device("cpu")
        self._local = LocalContext(checkpoints)

    def preempted(self) -> bool:
        return False

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        with self._local.latest_checkpoint() as folder:
            yield folder
        torch.distributed.barrier()

    def new_folder(self) -> Path:
        return self._local.new_folder()

    def publish(self, folder: Path | None, *, name: str, loss: float | None) -> None:
        if folder is not None:
            self._local.publish(folder, name=name, loss=loss)


def work(rank: int, world_size: int, job: TrainingJob, folder: str) -> None:
    """One of `world_size` processes."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    train_loop(job, GlooContext(rank, world_size, Path(folder) / "checkpoints"))
    torch.distributed.destroy_process_group()
