"""What training carries from step to step, and one step of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ncsn.core.ema import Ema
from ncsn.core.objectives import DenoisingScoreMatching, Objective

_DSM = DenoisingScoreMatching()


@dataclass
class TrainState:
    """All that a resumed run needs besides its config.

    Attributes:
        network: The score network itself, without a DDP wrapper.
        optimizer: Its optimizer.
        ema: The running average of its weights.
        images_seen: Training images consumed by all workers.
        scaler: Keeps float16 gradients in range; None for other types.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema
    images_seen: int = 0
    scaler: torch.amp.GradScaler | None = None


@dataclass(frozen=True)
class StepReport:
    """Figures of one optimizer step on this worker, left on their device so that reading them is the caller's choice.

    Attributes:
        loss: Scalar, the objective over this worker's images.
        per_image: float32 [B], normalised so that a zero network reads 1.0.
        grad_norm: Scalar, norm of the whole gradient before clipping; after DDP's averaging if the network is wrapped;
            0 where `scaler` left the step out because the gradient was out of float16's range.
    """

    loss: Tensor
    per_image: Tensor
    grad_norm: Tensor


def train_step(
    network: nn.Module,
    *,
    optimizer: torch.optim.Optimizer,
    ema: Ema,
    x: Tensor,
    level: Tensor,
    z: Tensor,
    sigmas: Tensor,
    v: Tensor | None = None,
    objective: Objective = _DSM,
    grad_clip_norm: float | None = None,
    autocast_dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    microbatch: int | None = None,
    mean_share: float | None = None,
) -> StepReport:
    """One optimizer step, and the update of the running average.

    The gradient is that of the mean over the images of all workers, in however many and whatever unequal parts they
    share them.

    Args:
        network: The score network in train mode, wrapped in DistributedDataParallel or not.
        optimizer: The optimizer of its parameters.
        ema: The running average of its parameters.
        x: Clean images [B, C, H, W] in [0, 1].
        level: Noise level of each image, int64 [B].
        z: Standard normal numbers of x's shape.
        sigmas: Noise levels [L], descending.
        v: Projections [P, B, C, H, W], for the objective that needs them.
        objective: What is minimised.
        grad_clip_norm: Clip the gradient's norm to this; None leaves it.
        autocast_dtype: Compute the network's convolutions in this type; None computes them in the parameters' type.
        scaler: Scales the loss for float16, and leaves out a step whose gradient overflows.
        microbatch: Images that go through the network at once; None puts all through.
        mean_share: Images of the global batch by number of workers; None if all workers have as many as this one.
    """

    def score(noisy: Tensor, noise_level: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            result: Tensor = network(noisy, noise_level)
        return result

    optimizer.zero_grad(set_to_none=True)
    count, loss, per_image = len(x), torch.zeros((), device=x.device), []
    for part in _parts(count, microbatch):
        with _exchange(network, now=part.stop == count):
            projections = None if v is None else v[:, part]
            result = objective(score, x[part], level=level[part], sigmas=sigmas, z=z[part], v=projections)
            images = part.stop - part.start
            weighted = result.loss * (images / (mean_share or count))
            torch.autograd.backward(weighted if scaler is None else scaler.scale(weighted))
        loss = loss + result.loss.detach() * (images / count)
        per_image.append(result.per_image)
    if scaler is not None:
        scaler.unscale_(optimizer)
    grad_norm = clip_gradient(network, max_norm=math.inf if grad_clip_norm is None else grad_clip_norm)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
        grad_norm = torch.where(grad_norm.isfinite(), grad_norm, 0.0)
    ema.update(network.module if isinstance(network, DistributedDataParallel) else network)
    return StepReport(loss=loss, per_image=torch.cat(per_image), grad_norm=grad_norm)


def _parts(count: int, size: int | None) -> Iterator[slice]:
    """The fewest parts of at most `size` out of `count`, alike but for one image."""
    number = 1 if size is None else math.ceil(count / size)
    for index in range(number):
        yield slice(count * index // number, count * (index + 1) // number)


def _exchange(network: nn.Module, *, now: bool) -> AbstractContextManager[None]:
    """Let the workers average their gradients in this backward pass, or only add up their own."""
    if now or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


def clip_gradient(network: nn.Module, *, max_norm: float) -> Tensor:
    """Scale the gradient down to `max_norm` if it is longer, and give its norm from before."""
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if max_norm < math.inf:
        nn.utils.clip_grads_with_norm_(network.parameters(), max_norm, norm)
    return norm
