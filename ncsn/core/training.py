"""What training carries from step to step, one step, and an optimizer."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
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
NEWTON_SCHULZ_STEPS = 5
MOMENTUM = 0.95  # share of the average gradient that stays at each step
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5, which bring small singular values up fastest


@dataclass
class TrainState:
    """The state of training, which a checkpoint restores."""

    network: nn.Module  # without a DDP wrapper
    optimizer: torch.optim.Optimizer
    ema: Ema
    images_seen: int = 0  # by all workers
    uncertainty: nn.Module | None = None  # that the loss learns with the network; without an average
    narrow: NarrowWeights | None = field(default=None, init=False)  # that steps on a GPU use, and no checkpoint has

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters in the order of the optimizer."""
        yield from self.network.named_parameters()
        if self.uncertainty is not None:
            yield from self.uncertainty.named_parameters(prefix="uncertainty")

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
    """One optimizer step on this worker's share of the global batch, and the update of the EMA.

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
    state.ema.update(module, images_seen=state.images_seen + global_batch, batch=global_batch)
    return torch.cat(per_image), grad_norm


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices [N, R, C] with their singular vectors, and singular values of 0.7 to 1.2 where they are not tiny."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalized(matrices.mT).mT
    wide: Tensor = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp_min(1e-7)
    # Each step of Newton-Schulz multiplies by a polynomial of this small square matrix, so the wide one waits.
    gram = wide @ wide.mT
    if gram.is_cuda:  # TF32, as GPUs multiply, makes its tiny eigenvalues negative, and the steps these large
        gram = gram.double()
    first, third, fifth = COEFFICIENTS
    product = torch.eye(gram.shape[1], device=gram.device, dtype=gram.dtype).expand_as(gram)
    for _ in range(NEWTON_SCHULZ_STEPS):
        step = torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth)
        step.diagonal(dim1=1, dim2=2).add_(first)
        product, gram = step @ product, step @ gram @ step
    return product.to(wide.dtype) @ wide


class Muon(torch.optim.Optimizer):
    """Muon for the weights of hidden convolutions (Jordan et al. 2024), and the optimizer of all others.

    A convolution is the matrix [out, in * kernel]. Its momentum is orthogonalized, so that a step moves the layer's
    output as much in rare directions as in the commonest one.
    """

    def __init__(self, hidden: Sequence[nn.Parameter], others: torch.optim.Optimizer, *, learning_rate: float) -> None:
        super().__init__([{"params": hidden, "initial_lr": learning_rate}], {"lr": learning_rate})
        self.others, others.state = others, self.state  # one state of all parameters, as checkpoints have it
        self.param_groups += others.param_groups

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; matrices of one shape together, which is faster."""
        by_shape, group = defaultdict[tuple[int, int], list[Tensor]](list), self.param_groups[0]
        for weight in group["params"]:
            if weight.grad is not None:
                by_shape[len(weight), weight[0].numel()].append(weight)
                self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        for (rows, columns), weights in by_shape.items():
            gradients = [each.grad for each in weights if each.grad is not None]
            momenta = [self.state[each]["momentum"] for each in weights]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's
            found = orthogonalized(torch.stack([each.reshape(rows, columns) for each in ahead]))
            rate = group["lr"] * max(1, rows / columns) ** 0.5
            changes = [change.view_as(weight) for change, weight in zip(found, weights, strict=True)]
            torch._foreach_add_(weights, changes, alpha=-rate)
        self.others.step()
