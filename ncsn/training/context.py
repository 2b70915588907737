"""Where the training loop runs: one worker among several."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ncsn.config import Config
from ncsn.core.keyed_random import to_device
from ncsn.core.networks.layers import FUSION
from ncsn.errors import UserError
from ncsn.model import build

FEW_IMAGES = 128  # of a worker: Python launches a thousand kernels per step, which takes longer than to compute these

_logger = logging.getLogger(__name__)


class WorkerContext:
    """One worker among `world_size`; by itself, a single one. All call the same methods in the same order."""

    rank = 0  # the worker that writes has 0
    world_size = 1
    hung: str | None = None  # URI of the folder where a worker that hangs leaves its stacks before it ends; None: never
    spans_nodes = False  # whether gradients go from GPUs of one node to those of another

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    def share(self, batch_size: int) -> range:
        """This worker's places in a global batch; shares differ by at most one image."""
        return range(batch_size * self.rank // self.world_size, batch_size * (self.rank + 1) // self.world_size)

    @contextmanager
    def mistakes_shared(self) -> Iterator[None]:
        """Context manager: an InvalidValue of one worker in the block is raised by all. A barrier at its end."""
        # Such an error is no failure for Ray, so the others would wait for this worker forever.
        yield

    def preempted(self) -> bool:
        """Whether a machine of the workers is about to be preempted, the same on every worker. A barrier."""
        return False

    def wrap(self, network: nn.Module, *, dtype: torch.dtype | None) -> nn.Module:  # noqa: ARG002 - of several
        """The network, which computes in `dtype` (None: its parameters'), with gradients averaged over the workers."""
        return network

    def share_weights(self, network: nn.Module) -> None:
        """Give all workers the parameters of rank 0. `wrap` does that too."""

    def average(self, gradients: Sequence[Tensor]) -> None:
        """Replace gradients by their means over the workers, in one exchange."""

    def sum_over_workers(self, tensor: Tensor) -> Tensor:
        """The sum of the workers' tensors, the same on each."""
        return tensor


class StepTimer:
    """Due about every `seconds`, on all workers at the same step."""

    # Collective work cannot follow each worker's own clock, and a fixed number of steps is too often for a small
    # network and too seldom for a large one. So the workers agree each time on the steps to the next.

    def __init__(self, context: WorkerContext, *, seconds: float) -> None:
        self._context, self._seconds = context, seconds
        self._steps = self._left = 1
        self._since = time.perf_counter()

    def due(self) -> bool:
        """Count a step, and say whether it is time. Then `exchange` is to follow."""
        self._left -= 1
        return not self._left

    def exchange(self, *values: float) -> list[float]:
        """The sums of the workers' values, once it is time. A collective call, which waits for the device once."""
        now, context = time.perf_counter(), self._context
        own = torch.tensor([(now - self._since) / self._steps, *values], dtype=torch.float64)
        seconds, *sums = context.sum_over_workers(to_device(own, context.device)).cpu().tolist()
        step_seconds = seconds / context.world_size
        # At most twice as far as before, because the first steps of a training are slower.
        self._steps = self._left = max(1, min(2 * self._steps, round(self._seconds / max(step_seconds, 1e-9))))
        self._since = now
        return sums


def prepare_network(
    network: nn.Module, config: Config, context: WorkerContext, *, teacher: nn.Module | None = None
) -> tuple[nn.Module, str]:
    """Compile network and teacher in place, if that is chosen, and wrap the network where its passes average gradients.

    The names of its tensors stay. A collective call.

    Returns:
        The network that steps call, and for people on what and how training computes.
    """
    compiled = compiles(config, context)
    graphs = compiled and fits_cuda_graphs(config, context)
    if compiled:
        # Shares and their parts differ by at most one image, so shapes are few. Where DistributedDataParallel calls the
        # network, Dynamo makes a graph for each bucket, so that averaging overlaps with the backward pass.
        options = None if context.device.type == "cpu" else {**FUSION, "triton.cudagraphs": graphs}
        # A graph may overwrite what the one before has returned; the loss has used it by then.
        for each in [network] if teacher is None else [network, teacher]:
            each.compile(dynamic=False, options=options)
    name = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else "cpu"
    order = "channels last" if config.compute.uses_channels_last else "channels first"
    how = "not compiled" if not compiled else "compiled, in CUDA graphs" if graphs else "compiled"
    if graphs:
        # Under DistributedDataParallel they are recorded again and again (PyTorch's issue 140395, open in 2.15). To
        # average when a step's gradients are there costs a node's GPUs a millisecond, and Python tens of them.
        context.share_weights(network)
    else:
        network = context.wrap(network, dtype=build.autocast_dtype(config))
    return network, f"{context.world_size} x {name}: {config.train.precision}, {order}, {how}"


def fits_cuda_graphs(config: Config, context: WorkerContext) -> bool:
    """Whether a compiled network is to run in CUDA graphs, which spare a GPU with few images its wait for Python."""
    # Of the largest share, because all workers must do the same: those with graphs average in another exchange.
    share = math.ceil(config.train.batch_size / context.world_size)
    one_pass = share <= (config.compute.microbatch or share)  # the next one would overwrite the gradients of the first
    # Between nodes an exchange takes long, and is to overlap with the backward pass.
    return context.device.type == "cuda" and not context.spans_nodes and one_pass and share <= FEW_IMAGES


def compiles(config: Config, context: WorkerContext) -> bool:
    """Whether the network is to be compiled, the same on each worker; each needs a compiler for it."""
    compute = config.compute
    if not compute.compiled or config.loss.differentiates_twice:
        return False
    on_cpu = context.device.type == "cpu"
    compilers = [os.environ.get("CXX", "g++"), "clang++"] if on_cpu else ["cc", "gcc", "clang"]
    lacks = torch.tensor([float(not any(map(shutil.which, compilers)))], device=context.device)
    if context.sum_over_workers(lacks) == 0:
        return True
    needs = f"needs a compiler on each worker, one of {', '.join(compilers)}"
    if compute.compile is True:
        raise UserError("compute.compile", needs, hint="install one, or set it to auto", value=True)
    if context.rank == 0:
        _logger.warning("the network is not compiled, which %s", needs)
    return False
