"""Where the training loop runs: one worker among several, which ends itself when it hangs."""

from __future__ import annotations

import faulthandler
import inspect
import logging
import math
import os
import shutil
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from ncsn import storage
from ncsn.config import Config
from ncsn.core.keyed_random import to_device
from ncsn.core.networks.layers import FUSION
from ncsn.errors import InvalidValue, UserError
from ncsn.model import build
from ncsn.storage.retry import RETRY, limited

FEW_IMAGES = 128  # of a worker: Python launches a thousand kernels per step, which takes longer than to compute these

STEP_SECONDS = 120.0  # that a step may take in any case
SLOWER = 10  # times as long as before it may take too
LONG_SECONDS = 1800.0  # where it compiles, or waits for the store; also torch's default limit of a collective operation
TICK_SECONDS = 1.0
END_SECONDS = 10.0  # in which each worker leaves its stacks: they fail when the first one ends

# All buffers are constants. Torch 2.13 renamed the argument that says so.
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}

_logger = logging.getLogger(__name__)


class WorkerContext:
    """One worker among `world_size`; all call the same methods in the same order.

    Several are those of torch's process group: gloo on CPUs, NCCL on GPUs.
    """

    hung: str | None = None  # URI of the folder where a worker that hangs leaves its stacks before it ends; None: never
    spans_nodes = False  # whether gradients go from GPUs of one node to those of another

    def __init__(self, device: str | torch.device = "cpu", *, rank: int = 0, world_size: int = 1) -> None:
        self.device = torch.device(device)
        self.rank, self.world_size = rank, world_size  # the worker that writes has rank 0

    def share(self, batch_size: int) -> range:
        """This worker's places in a global batch; shares differ by at most one image."""
        return range(batch_size * self.rank // self.world_size, batch_size * (self.rank + 1) // self.world_size)

    @contextmanager
    def mistakes_shared(self) -> Iterator[None]:
        """Context manager: an InvalidValue in the block is raised by all, of several that of the lowest rank.

        A barrier at its end.
        """
        # Such an error is no failure for Ray, so the others would wait for this worker forever.
        own: InvalidValue | None = None
        try:
            yield
        except InvalidValue as mistake:
            own = mistake
        mistakes = [own] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(mistakes, own)
        for each in mistakes:
            if each is not None:
                raise each

    def preempted(self) -> bool:
        """Whether a machine of the workers is about to be preempted, the same on every worker. A barrier."""
        return False

    def wrap(self, network: nn.Module, *, dtype: torch.dtype | None) -> nn.Module:
        """The network, which computes in `dtype` (None: its parameters'), with gradients averaged over the workers.

        Several have it under DistributedDataParallel. Between nodes the gradients of a network that computes in
        bfloat16 travel in it, in half the bytes.
        """
        if self.world_size == 1:
            return network
        # For 1x1 convolutions two kinds of strides name one layout in memory, so no copy is made.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        wrapped = DistributedDataParallel(network, gradient_as_bucket_view=True, **_NO_BUFFER_SYNC)
        if self.spans_nodes and dtype is torch.bfloat16:
            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped

    def share_weights(self, network: nn.Module) -> None:
        """Give all workers the parameters of rank 0: equal seeds do not give equal bits on unlike CPUs.

        `wrap` does that too.
        """
        if self.world_size > 1:
            for parameter in network.parameters():
                torch.distributed.broadcast(parameter.detach(), src=0)

    def average(self, gradients: Sequence[Tensor]) -> None:
        """Replace gradients by their means over the workers, in one exchange of a copy, as CUDA graphs own theirs."""
        if self.world_size == 1 or not gradients:
            return
        # In the order of the memory, which autograd makes that of the parameters, so the same on all workers.
        values = [each.as_strided((each.numel(),), (1,)) for each in gradients]
        flat = torch.cat(values)
        torch.distributed.all_reduce(flat)
        flat /= self.world_size
        torch._foreach_copy_(values, torch.split(flat, [len(each) for each in values]))

    def sum_over_workers(self, tensor: Tensor) -> Tensor:
        """The sum of the workers' tensors, the same on each, in the place of this one's."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


@dataclass
class StepTimer:
    """Due about every `seconds`, on all workers at the same step."""

    # Collective work cannot follow each worker's own clock, and a fixed number of steps is too often for a small
    # network and too seldom for a large one. So the workers agree each time on the steps to the next.

    context: WorkerContext
    _: KW_ONLY
    seconds: float
    _steps: int = field(default=1, init=False)  # between the last time and the next
    _left: int = field(default=1, init=False)
    _since: float = field(default_factory=time.perf_counter, init=False)

    def due(self) -> bool:
        """Count a step, and say whether it is time. Then `exchange` is to follow."""
        self._left -= 1
        return not self._left

    def exchange(self, *values: float) -> list[float]:
        """The sums of the workers' values, once it is time. A collective call, which waits for the device once."""
        now, context = time.perf_counter(), self.context
        own = torch.tensor([(now - self._since) / self._steps, *values], dtype=torch.float64)
        seconds, *sums = context.sum_over_workers(to_device(own, context.device)).cpu().tolist()
        step_seconds = seconds / context.world_size
        # At most twice as far as before, because the first steps of a training are slower.
        self._steps = self._left = max(1, min(2 * self._steps, round(self.seconds / max(step_seconds, 1e-9))))
        self._since = now
        return sums


class Watchdog:
    """A thread that ends this process if its training comes no further, where `context.hung` says so, until `stop`.

    Then training starts again from its last checkpoint.

    Its clock are its own ticks: it stands still while the process is stopped or the machine is suspended, and while
    another thread keeps Python's lock, which none does that waits for a device, a worker or a file.
    """

    # The others wait for the worker that hangs, so all of them end; whose stack differs from the others' is the one.

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        # Nobody knows how long the first step takes on a CPU, where a large batch may be an hour's work.
        self._limit = LONG_SECONDS if context.device.type == "cuda" else math.inf
        self._now = self._since = self._usual = 0.0  # seconds; the last decays, because the first step is slow
        self._ended, self._ending, self._fired = threading.Event(), threading.Lock(), False
        if context.hung is not None:
            threading.Thread(target=self._watch, args=[context.hung], name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """What follows may take any time, in this process too."""
        with self._ending:
            self._ended.set()
            if self._fired:
                faulthandler.cancel_dump_traceback_later()

    def allow(self, least: float, *, stepped: bool = False) -> None:
        """What this worker, or one that it waits for, does until the next call may take `least` seconds, or more.

        For all to call. `stepped`: all workers have come this far, on their devices too.
        """
        self._usual = max(self._now - self._since, self._usual / 2 if stepped else self._usual)
        self._since, self._limit = self._now, max(STEP_SECONDS, least, SLOWER * self._usual)

    def _watch(self, folder: str) -> None:
        while self._now - self._since <= self._limit:
            if self._ended.wait(TICK_SECONDS):
                return
            self._now += TICK_SECONDS
        with self._ending:
            if self._ended.is_set():
                return
            self._fired = True
            faulthandler.dump_traceback_later(END_SECONDS, exit=True, file=2)  # whatever becomes of the following
        rank, idle = self._context.rank, self._now - self._since
        _logger.warning("%sworker %d made no step for %.0f s; the workers' stacks are in %s", RETRY, rank, idle, folder)
        frames, lines = sys._current_frames(), list[str]()
        for thread in threading.enumerate():
            if thread.ident in frames:
                lines += [f"{thread.name}:\n", *traceback.format_stack(frames[thread.ident]), "\n"]
        with limited(0):
            storage.write_text(storage.join(folder, f"worker-{rank}.txt"), "".join(lines))


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
    order = "channels last" if build.memory_format(config) is torch.channels_last else "channels first"
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
