"""How fast this machine trains and samples a network, by a few steps on noise; and the FLOP of a network."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ncsn.config import Config
from ncsn.core.losses import Batch
from ncsn.core.training import train_step
from ncsn.errors import UserError
from ncsn.model import build

SECONDS = 0.25  # of one measurement, at least
# Of several workers together, by one that has the machine for itself: they exchange gradients and share its caches.
TOGETHER = 0.75


@dataclass(frozen=True)
class Machine:
    """What there is to compute on."""

    cores: int
    gpus: int
    gpu: str = ""  # name of the first

    @classmethod
    def here(cls) -> Machine:
        """This machine."""
        gpus = torch.cuda.device_count()
        return cls(len(os.sched_getaffinity(0)), gpus, torch.cuda.get_device_name() if gpus else "")

    @property
    def workers(self) -> int:
        """Workers that use it well: one for each GPU, else one for each core up to four."""
        return self.gpus or min(4, self.cores)

    @property
    def cores_per_worker(self) -> int:
        """Its cores, divided."""
        return max(1, self.cores // self.workers)

    def __str__(self) -> str:
        if self.gpus:
            return f"{self.gpus} {self.gpu}"
        return f"{self.cores} CPU core{'s' * (self.cores > 1)}"


@dataclass(frozen=True)
class Speed:
    """Seconds of all workers together."""

    train_image: float
    evaluate_image: float  # in one network evaluation of a sampler


def measure_speed(config: Config) -> Speed:
    """Time a few training steps and evaluations of one worker's share; the config has noise levels."""
    if config.compute.use_gpu and not torch.cuda.is_available():
        raise UserError(
            "compute.use_gpu", "no GPU here to measure", hint="use false, or predict with --tflops N", value=True
        )
    workers, cores = config.compute.max_workers, config.compute.cpus_per_worker
    device = torch.device(config.compute.device)
    count = max(1, config.train.batch_size // workers)
    with torch_threads(cores):
        state = build.train_state(config, device=device)
        options = build.step_options(config, world_size=1)
        loss = build.loss(config, state.uncertainty)
        size = config.data.image_size
        generator = torch.Generator().manual_seed(0)
        shape = (count, config.data.channels, size, size)
        sigma, level = build.training_noise(config).draw(0, first=0, count=count)
        batch = Batch(torch.rand(shape, generator=generator), sigma, torch.randn(shape, generator=generator), level)
        batch = batch.to(device, memory_format=build.memory_format(config))

        def train() -> None:
            train_step(state.network, batch, state=state, loss=loss, options=options)

        @torch.inference_mode()
        def evaluate() -> Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.autocast_dtype is not None):
                score: Tensor = state.network(batch.x, **batch.inputs)
            return score

        per_image = workers * count * (TOGETHER if workers > 1 else 1.0)
        return Speed(
            train_image=_seconds(train, device) / per_image, evaluate_image=_seconds(evaluate, device) / per_image
        )


def forward_flop(network: nn.Module, config: Config) -> int:
    """FLOP of one image in a network on the device `meta`; a multiplication and its addition are two."""
    data = config.data
    image = torch.zeros(1, data.channels, data.image_size, data.image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image, torch.zeros(1, dtype=torch.int64, device="meta"))
    return int(counter.get_total_flops())


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call; the first warms up."""
    # A CPU's own time, so that other work on the machine does not count.
    clock, threads = (time.perf_counter, 1) if device.type == "cuda" else (time.process_time, torch.get_num_threads())
    work()
    _finish(device)
    calls, started = 0, clock()
    while (taken := (clock() - started) / threads) < SECONDS:
        work()
        _finish(device)
        calls += 1
    return taken / calls


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use this many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
