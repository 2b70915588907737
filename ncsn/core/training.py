"""What training carries from step to step, and one step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from ncsn.core.ema import Ema
from ncsn.core.losses import Batch, Loss

if TYPE_CHECKING:
    from ncsn.core.narrow_weights import NarrowWeights

EVALUATIONS_PER_STEP = 3  # network evaluations that a training step costs per image: one forward, two backward


@dataclass
class TrainState:
    """The state of training, which a checkpoint restores."""

    network: nn.Module  # without a DDP wrapper
    optimizer: torch.optim.Optimizer
    ema: Ema
    images_seen: int = 0  # by all workers
    uncertainty: nn.Module | None = None  # that the loss learns with the network; without an average
    second_ema: Ema | None = None  # with another memory, for averages that are put together after training
    narrow: NarrowWeights | None = field(default=None, init=False)  # that steps on a GPU use, and no checkpoint has

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters in the order of the optimizer."""
        yield from self.network.named_parameters()
        if self.uncertainty is not None:
            yield from self.uncertainty.named_parameters(prefix="uncertainty")

    @property
    def averages(self) -> list[Ema]:
        """All EMAs, first the one that generates images."""
        return [self.ema] if self.second_ema is None else [self.ema, self.second_ema]

    def averaged(self) -> nn.Module:
        """A copy of the network with the EMA as its weights, in eval mode."""
        network = copy.deepcopy(self.network)
        self.ema.copy_to(network)
        return network.eval()


@dataclass(frozen=True)
class StepOptions:
    """How one step computes."""

    grad_clip_norm: float | None = None  # largest norm of the gradient
    autocast_dtype: torch.dtype | None = None  # of the network's convolutions; None for that of the parameters
    microbatch: int | None = None  # images that go through the network at once; None for all
    batch_size: int | None = None  # images of the global batch; None for those of this worker
    world_size: int = 1  # workers that share it


def train_step(
    network: nn.Module,
    batch: Batch,
    *,
    state: TrainState,
    loss: Loss,
    options: StepOptions,
    average: Callable[[list[Tensor]], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimizer step on this worker's share of the global batch, and the update of the EMAs.

    The gradient is that of the mean over the images of all workers, also if their shares differ. The network is
    `state.network` in train mode; the caller counts `images_seen`. Where workers share the batch, `average` replaces
    gradients by their means over the workers: all, or those that a network in DistributedDataParallel has not averaged.

    Returns:
        The loss of each image of this worker before the step, float32 [B], normalized so that a zero network reads 1.0;
        and the norm of the gradient before clipping, a scalar, of the workers' average.
    """
    dtype, optimizer, device = options.autocast_dtype, state.optimizer, batch.x.device
    module = network.module if isinstance(network, DistributedDataParallel) else network
    # On a CPU there is nothing to gain, and some layers compute with weights before they are cast.
    if dtype is not None and device.type == "cuda" and state.narrow is None:
        from ncsn.core.narrow_weights import NarrowWeights  # here, so that a CPU does not load it

        state.narrow = NarrowWeights(module, dtype)
    if state.narrow is not None:
        state.narrow.fill()

    def score(noisy: Tensor, **inputs: Tensor) -> Tensor:
        prefix, copies = "" if network is module else "module.", state.narrow.of_pass() if state.narrow else {}
        copies = {prefix + name: each for name, each in copies.items()}
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            result: Tensor = functional_call(network, copies, (noisy,), inputs) if copies else network(noisy, **inputs)
        return result

    optimizer.zero_grad(set_to_none=True)
    count, per_image = len(batch.x), []
    global_batch = options.batch_size or count * options.world_size
    # The fewest parts of at most `microbatch` images, whose sizes differ by at most one.
    parts = 1 if options.microbatch is None else math.ceil(count / options.microbatch)
    for first, end in pairwise(count * index // parts for index in range(parts + 1)):
        # Workers average their gradients in the last backward pass, and until then add up their own.
        with network.no_sync() if isinstance(network, DistributedDataParallel) and end < count else nullcontext():
            value = loss(score, batch[first:end])
            torch.autograd.backward(value.loss * ((end - first) / (global_batch / options.world_size)))
        per_image.append(value.per_image)
    if average is not None:
        averaged = set() if network is module else set(network.parameters())
        average([each.grad for _, each in state.trained() if each.grad is not None and each not in averaged])
    grad_norm = nn.utils.get_total_norm([each.grad for each in network.parameters() if each.grad is not None])
    if options.grad_clip_norm is not None:
        nn.utils.clip_grads_with_norm_(network.parameters(), options.grad_clip_norm, grad_norm)
    optimizer.step()
    for ema in state.averages:
        ema.update(module, images_seen=state.images_seen + global_batch, batch=global_batch)
    return torch.cat(per_image), grad_norm
