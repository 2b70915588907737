"""What training carries from step to step, the running average of the weights, and one step."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from ncsn.core.losses import Batch, Loss


class Ema:
    """Running average w <- m w + (1 - m) parameter of a network's weights (Song & Ermon 2020, technique 5).

    It starts from a copy of the parameters of the network, which is no DDP wrapper; m is `decay`, in [0, 1).
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the running average must be in [0, 1), got {decay}")
        self.decay = decay
        self.num_updates = 0
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in module.named_parameters()
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average toward the parameters; call it once after each optimizer step."""
        parameters: list[Tensor] = [parameter for _, parameter in self._matched(module)]
        torch._foreach_lerp_(list(self.weights.values()), parameters, 1 - self.decay)
        self.num_updates += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with the average."""
        for name, parameter in self._matched(module):
            parameter.copy_(self.weights[name])

    def state_dict(self) -> dict[str, Any]:
        """The average and its number of updates; the tensors are the live ones."""
        return {"weights": dict(self.weights), "num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`, on this object's devices and in its types.

        Raises:
            ValueError: A name is missing or unknown, or a shape differs.
        """
        weights: Mapping[str, Tensor] = state["weights"]
        if weights.keys() != self.weights.keys():
            missing, extra = self.weights.keys() - weights.keys(), weights.keys() - self.weights.keys()
            raise ValueError(
                f"these EMA weights belong to another network: missing {sorted(missing)}, extra {sorted(extra)}"
            )
        for name, weight in weights.items():
            needed = self.weights[name].shape
            if weight.shape != needed:
                raise ValueError(f"EMA weight {name} has shape {list(weight.shape)}, the network needs {list(needed)}")
        for name, weight in weights.items():
            self.weights[name].copy_(weight)
        self.num_updates = int(state["num_updates"])

    def _matched(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        named = list(module.named_parameters())
        if [name for name, _ in named] != list(self.weights):
            raise ValueError("the module's parameters are not those that the running average was made from")
        return named


@dataclass
class TrainState:
    """The state of training, which a checkpoint restores."""

    network: nn.Module  # without a DDP wrapper
    optimizer: torch.optim.Optimizer
    ema: Ema
    images_seen: int = 0  # by all workers
    scaler: torch.amp.GradScaler | None = None  # keeps float16 gradients in range; None for other types

    def averaged(self) -> nn.Module:
        """A copy of the network with the running average as its weights, in eval mode."""
        network = copy.deepcopy(self.network)
        self.ema.copy_to(network)
        return network.eval()


@dataclass(frozen=True)
class StepOptions:
    """How one step computes."""

    grad_clip_norm: float | None = None  # largest norm of the gradient
    autocast_dtype: torch.dtype | None = None  # of the network's convolutions; None for that of the parameters
    microbatch: int | None = None  # images that go through the network at once; None for all
    mean_share: float | None = None  # images of the global batch by number of workers; None if all have as many


@dataclass(frozen=True)
class StepReport:
    """Measurements of one optimizer step on this worker, on their device."""

    per_image: Tensor  # float32 [B], normalized so that a zero network reads 1.0
    # Scalar, before clipping; after DDP's averaging if the network is wrapped; 0 where the scaler skipped the step
    # because the gradient was out of float16's range.
    grad_norm: Tensor


def train_step(
    network: nn.Module, batch: Batch, *, state: TrainState, loss: Loss, sigmas: Tensor, options: StepOptions
) -> StepReport:
    """One optimizer step, and the update of the running average.

    The gradient is that of the mean over the images of all workers, also if their shares differ.

    Args:
        network: `state.network` in train mode, wrapped in DistributedDataParallel or not.
        batch: This worker's share of the global batch.
        state: Its weights, optimizer and average are updated; the caller counts `images_seen`.
        sigmas: Noise levels [L], descending.
    """
    dtype, scaler, optimizer = options.autocast_dtype, state.scaler, state.optimizer

    def score(noisy: Tensor, noise_level: Tensor) -> Tensor:
        with torch.autocast(noisy.device.type, dtype=dtype, enabled=dtype is not None):
            result: Tensor = network(noisy, noise_level)
        return result

    optimizer.zero_grad(set_to_none=True)
    count, per_image = len(batch), []
    for part in _parts(count, options.microbatch):
        with _exchange(network, now=part.stop == count):
            value = loss(score, batch[part], sigmas)
            weighted = value.loss * ((part.stop - part.start) / (options.mean_share or count))
            torch.autograd.backward(weighted if scaler is None else scaler.scale(weighted))
        per_image.append(value.per_image)
    if scaler is not None:
        scaler.unscale_(optimizer)
    grad_norm = clip_gradient(network, max_norm=math.inf if options.grad_clip_norm is None else options.grad_clip_norm)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
        grad_norm = torch.where(grad_norm.isfinite(), grad_norm, 0.0)
    state.ema.update(network.module if isinstance(network, DistributedDataParallel) else network)
    return StepReport(per_image=torch.cat(per_image), grad_norm=grad_norm)


def _parts(count: int, size: int | None) -> Iterator[slice]:
    """The fewest parts of at most `size` images, whose sizes differ by at most one."""
    number = 1 if size is None else math.ceil(count / size)
    for index in range(number):
        yield slice(count * index // number, count * (index + 1) // number)


def _exchange(network: nn.Module, *, now: bool) -> AbstractContextManager[None]:
    """Context in which workers average their gradients in the backward pass, or only add up their own."""
    if now or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


def clip_gradient(network: nn.Module, *, max_norm: float) -> Tensor:
    """Scale the gradient down to `max_norm` if it is longer, and return its norm before."""
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if max_norm < math.inf:
        nn.utils.clip_grads_with_norm_(network.parameters(), max_norm, norm)
    return norm
