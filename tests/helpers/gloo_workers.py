"""Training by several processes that average with gloo, like Ray's workers, without Ray."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed

from ncsn.distributed.trainer import RayContext
from ncsn.model.checkpoint import DamagedError
from ncsn.model.checkpoint_store import CheckpointStore
from ncsn.training.loop import TrainingJob, train_loop


class GlooContext(RayContext):
    """A worker like Ray's."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.device = rank, world_size, torch.device("cpu")

    def preempted(self) -> bool:
        return False


class TornCopy(CheckpointStore):
    """A checkpoint arrives without half of its weights."""

    @contextmanager
    def open(self, name: str) -> Iterator[Path]:
        with super().open(name) as folder, tempfile.TemporaryDirectory() as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            weights = Path(copy) / "weights.safetensors"
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
            yield Path(copy)


@contextmanager
def group(rank: int, world_size: int, folder: str) -> Iterator[None]:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    yield
    torch.distributed.destroy_process_group()


def work(rank: int, world_size: int, job: TrainingJob, folder: str) -> None:
    with group(rank, world_size, folder):
        train_loop(job, GlooContext(rank, world_size), CheckpointStore(f"{folder}/checkpoints"))


def resume_from_a_torn_copy(rank: int, world_size: int, job: TrainingJob, folder: str) -> None:
    """One of `world_size` processes, of which the last gets a torn copy; its error goes to `mistake-<rank>`."""
    store = TornCopy if rank == world_size - 1 else CheckpointStore
    with group(rank, world_size, folder):
        try:
            train_loop(job, GlooContext(rank, world_size), store(f"{folder}/checkpoints"))
        except DamagedError as mistake:
            Path(folder, f"mistake-{rank}").write_text(mistake.reason)
