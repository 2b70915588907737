"""What training carries from step to step, and one step of it."""

from __future__ import annotations

import math
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
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema
    images_seen: int = 0


@dataclass(frozen=True)
class StepReport:
    """Figures of one optimizer step on this worker, left on their device so that reading them is the caller's choice.

    Attributes:
        loss: Scalar, the objective over this worker's images.
        per_image: float32 [B], normalised so that a zero network reads 1.0.
        grad_norm: Scalar, norm of the whole gradient before clipping; after DDP's averaging if the network is wrapped.
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
) -> StepReport:
    """One optimizer step, and the update of the running average.

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
    """

    def score(noisy: Tensor, noise_level: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            result: Tensor = network(noisy, noise_level)
        return result

    optimizer.zero_grad(set_to_none=True)
    result = objective(score, x, level=level, sigmas=sigmas, z=z, v=v)
    torch.autograd.backward(result.loss)
    max_norm = math.inf if grad_clip_norm is None else grad_clip_norm
    grad_norm = clip_gradient(network, max_norm=max_norm)
    optimizer.step()
    ema.update(network.module if isinstance(network, DistributedDataParallel) else network)
    return StepReport(loss=result.loss.detach(), per_image=result.per_image, grad_norm=grad_norm)


def clip_gradient(network: nn.Module, *, max_norm: float) -> Tensor:
    """Scale the gradient down to `max_norm` if it is longer, and give its norm from before."""
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if max_norm < math.inf:
        nn.utils.clip_grads_with_norm_(network.parameters(), max_norm, norm)
    return norm
