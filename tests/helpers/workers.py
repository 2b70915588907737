"""Training by workers: one in this process, or several processes that average with gloo, like Ray's, without Ray."""

from __future__ import annotations

import copy
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed
from PIL import Image
from safetensors.torch import load
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from ncsn import storage
from ncsn.config import Config
from ncsn.core.training import TrainState
from ncsn.model.checkpoint import CheckpointStore, DamagedError
from ncsn.runs.history import load_history
from ncsn.training import context as training_context, loop
from ncsn.training.context import WorkerContext, prepare_network
from ncsn.training.loop import Training, TrainingJob, TrainOutcome, train_loop


@dataclass
class Recorder:
    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    pictures: list[tuple[int, np.ndarray]] = field(default_factory=list)
    closed: bool = False

    def log(self, metrics: dict[str, float], images_seen: int, when: int, *, png: bytes = b"") -> None:
        if png:
            self.pictures.append((images_seen, np.array(Image.open(io.BytesIO(png)))[..., None]))
        else:
            self.points.append((images_seen, metrics))

    def close(self) -> None:
        self.closed = True


def train_locally(job: TrainingJob, folder: Path | str) -> TrainOutcome:
    return train_loop(job, WorkerContext(), CheckpointStore(str(folder)))


class Killed(BaseException):
    """Nothing after it happens."""


def train_until_killed(job, folder, *, at="") -> None:
    """Train until a checkpoint is stored: the first, or the one with the name `at`."""

    class Dies(CheckpointStore):
        def publish(self, write: Callable[[Path], None], *, name: str) -> None:
            super().publish(write, name=name)
            self.wait()
            if at in name:
                raise Killed

    with pytest.raises(Killed):
        train_loop(job, WorkerContext(), Dies(str(folder)))


def tensors(checkpoint: Path | str) -> dict[str, Tensor]:
    """Weights, EMA and optimizer of a checkpoint, by file and name."""
    return {
        f"{file}:{name}": tensor
        for file in ("weights", "ema", "optimizer")
        for name, tensor in load(storage.read_bytes(storage.join(str(checkpoint), f"{file}.safetensors"))).items()
    }


def train(config: Config, dataset: str, folder: Path, sink: Recorder | None = None) -> Path:
    """Train; the last checkpoint."""
    return folder / train_locally(TrainingJob(config=config, dataset=dataset, sink=sink), folder).checkpoint


def assert_same_tensors(one: Path | str, other: Path | str) -> None:
    """Weights, EMA and optimizer of two checkpoints are equal to the last bit."""
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


def assert_close_tensors(one: Path | str, other: Path | str, *, rtol: float = 1e-4) -> None:
    """Weights and EMA of two checkpoints are equal to rounding."""
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    for name in left:
        if not name.startswith("optimizer:"):
            assert left[name].allclose(right[name], rtol=rtol, atol=1e-5), name


def assert_same_training(whole: str, disturbed: str) -> None:
    """All checkpoints of two runs, given by the URIs of their folders, and their curves are equal."""
    names = checkpoints(whole)
    assert names and checkpoints(disturbed) == names
    for name in names:
        for part in ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"):
            files = (storage.join(run, "checkpoints", name, part) for run in (whole, disturbed))
            assert len(set(map(storage.read_bytes, files))) == 1, f"{part} of {name} differs"
    assert curves(disturbed) == curves(whole)


def checkpoints(run: str) -> list[str]:
    return [name for name in storage.list_names(storage.join(run, "checkpoints")) if name.startswith("images-")]


def curves(run: str) -> dict[str, list[tuple[int, float]]]:
    """Metric -> (images seen, value), of all metrics but the speed."""
    history = load_history(storage.join(run, "history.json"))
    found: dict[str, list[tuple[int, float]]] = {}
    for seen, point in zip(history.images_seen, history.points, strict=True):
        for name, value in point.items():
            if "per_second" not in name:
                found.setdefault(name, []).append((seen, value))
    return found


def assert_told_once(client: Any, name: str, run: str) -> None:
    """MLflow's run of training has each point of each curve of the run folder `run` exactly once, and no other."""
    experiments = [each.experiment_id for each in client.search_experiments()]
    (found,) = client.search_runs(experiments, f"tags.`ncsn.run` = '{name}' and tags.`ncsn.step` = 'train'")
    for metric, points in curves(run).items():
        told = [(each.step, each.value) for each in client.get_metric_history(found.info.run_id, metric)]
        assert sorted(told) == points, metric
    assert found.info.status == "FINISHED"


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
        train_loop(job, WorkerContext(rank=rank, world_size=world_size), CheckpointStore(f"{folder}/checkpoints"))


def work_in_graphs(rank: int, world_size: int, job: TrainingJob, folder: str) -> None:
    """Gradients are averaged after the backward pass; rank 1 starts from other weights."""
    train_state = loop.build.train_state

    def other(config: Config, *, device: torch.device) -> TrainState:
        state = train_state(config, device=device)
        for parameter in state.network.parameters():
            parameter.detach().add_(rank)
        return state

    fits = patch.object(training_context, "fits_cuda_graphs", lambda *_: True)
    compiles = patch.object(training_context, "compiles", lambda *_: True)
    compiled = patch.object(nn.Module, "compile", lambda *_, **__: None)
    with fits, compiles, compiled, patch.object(loop.build, "train_state", other):
        work(rank, world_size, job, folder)


def hang(rank: int, world_size: int, job: TrainingJob, folder: str) -> None:
    """The checkpoint of rank 0 at 32 images takes as long as a hundred steps may; at 80 images rank 2 hangs."""
    loop.CHECK_SECONDS = 0.0  # steps are looked at one by one, as where they are slow
    training_context.STEP_SECONDS, training_context.SLOWER = 1.0, 2
    training_context.TICK_SECONDS, training_context.END_SECONDS = 0.02, 3.0
    step, save = Training.step, Training.save

    def hangs(training: Training) -> None:
        if rank == 2 and training.state.images_seen == 80:
            time.sleep(600)
        step(training)

    def is_long(training: Training) -> None:
        time.sleep(0 if rank else 4)
        save(training)

    Training.step, Training.save = hangs, is_long  # type: ignore[method-assign]
    context = WorkerContext(rank=rank, world_size=world_size)
    context.hung = f"{folder}/hung"
    with group(rank, world_size, folder):
        train_loop(job, context, CheckpointStore(f"{folder}/checkpoints"))


def resume_from_a_torn_copy(rank: int, world_size: int, job: TrainingJob, folder: str) -> None:
    """One of `world_size` processes, of which the last gets a torn copy; its error goes to `mistake-<rank>`."""
    store = TornCopy if rank == world_size - 1 else CheckpointStore
    with group(rank, world_size, folder):
        try:
            train_loop(job, WorkerContext(rank=rank, world_size=world_size), store(f"{folder}/checkpoints"))
        except DamagedError as mistake:
            Path(folder, f"mistake-{rank}").write_text(mistake.reason)


def average_gradients(rank: int, world_size: int, config: Config, folder: str) -> None:
    """Compiled in buckets, they are the mean of the workers' gradients; compressed, the same in bfloat16."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    plain = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(512, 512), nn.SiLU())))
    generator = torch.Generator().manual_seed(0)
    for parameter in plain.parameters():
        nn.init.uniform_(parameter, -0.1, 0.1, generator=generator)
    x = torch.rand(2 + rank, 512, generator=generator.manual_seed(rank))
    with group(rank, world_size, folder):
        context = WorkerContext(rank=rank, world_size=world_size)
        compiled, compressed = copy.deepcopy(plain), copy.deepcopy(plain)
        with patch.object(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend)):
            wrapped, _ = prepare_network(compiled, config, context)
        wrapped.bucket_bytes_cap = 2**20  # the weights of a layer
        context.spans_nodes = True
        halved = context.wrap(compressed, dtype=torch.bfloat16)
        for _ in range(2):  # after the first, buckets are built again
            for network in (plain, wrapped, halved):
                network.zero_grad(set_to_none=True)
                for last in (False, True):
                    with nullcontext() if last or network is plain else network.no_sync():
                        network(x).square().mean().backward()
            for own, whole, half in zip(*(each.parameters() for each in (plain, compiled, compressed)), strict=True):
                mean = context.sum_over_workers(own.grad.clone()) / world_size
                torch.testing.assert_close(whole.grad, mean)
                torch.testing.assert_close(half.grad, mean, rtol=2**-6, atol=2**-6 * float(mean.abs().max()))
                assert half.grad.equal(half.grad.bfloat16().float()) and not mean.equal(mean.bfloat16().float())
    assert len(graphs) == 4, "one for each bucket"
    assert compiled.state_dict().keys() == plain.state_dict().keys()
