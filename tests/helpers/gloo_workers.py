"""Training by several processes that average over gloo as Ray's workers do, without Ray around them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed

from ncsn.distributed.trainer import RayContext
from ncsn.model.checkpoint import DamagedError
from ncsn.training.context import LocalContext
from ncsn.training.loop import TrainingJob, train_loop


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

    def publish(self, write: Callable[[Path], None] | None, *, name: str, loss: float | None) -> None:
        if write is not None:
            self._local.publish(write, name=name, loss=loss)


class TornCopy(GlooContext):
    """The latest checkpoint reaches the last worker without half of its weights."""

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        with super().latest_checkpoint() as folder, tempfile.TemporaryDirectory() as copy:
            assert folder is not None
            if self.rank < self.world_size - 1:
                yield folder
                return
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            weights = Path(copy) / "weights.safetensors"
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
            yield Path(copy)


@contextmanager
def group(rank: int, world_size: int, folder: str) -> Iterator[None]:
    """The processes that meet in `folder`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    yield
    torch.distributed.destroy_process_group()


def work(rank: int, world_size: int, job: TrainingJob, folder: str) -> None:
    """One of `world_size` processes."""
    with group(rank, world_size, folder):
        train_loop(job, GlooContext(rank, world_size, Path(folder) / "checkpoints"))


def resume_from_a_torn_copy(rank: int, world_size: int, job: TrainingJob, folder: str) -> None:
    """One of `world_size` processes; writes the mistake that it ends with to `mistake-<rank>`."""
    with group(rank, world_size, folder):
        try:
            train_loop(job, TornCopy(rank, world_size, Path(folder) / "checkpoints"))
        except DamagedError as mistake:
            Path(folder, f"mistake-{rank}").write_text(mistake.reason)
