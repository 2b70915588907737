"""The EMA, the running average of the weights that generates the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ncsn.core.networks.base import misfits
from ncsn.errors import InvalidValue

# How much of the EMA a step keeps: (images seen after the step, images of the step) -> m in [0, 1].
Decay = Callable[[int, int], float]


def step_decay(per_step: float) -> Decay:
    """The same factor m at each step, in [0, 1): the average depends on the batch size."""
    return lambda images_seen, batch: per_step  # noqa: ARG005


def half_life(images: float, ramp_up: float | None) -> Decay:
    """Weights lose half of their influence over h = min(H, r n) images, of n seen (Karras et al. 2022).

    H is `images` and r `ramp_up`, None for h = H.
    """
    share = math.inf if ramp_up is None else ramp_up
    return lambda images_seen, batch: float(0.5 ** (batch / min(images, share * images_seen)))


class Ema:
    """Running average w <- m w + (1 - m) parameter of a network's weights (Song & Ermon 2020, technique 5).

    It starts from a copy of the parameters of the network, which is no DDP wrapper.
    """

    def __init__(self, module: nn.Module, decay: Decay) -> None:
        self.decay = decay
        self.num_updates = 0
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in module.named_parameters()
        }

    @torch.no_grad()
    def update(self, module: nn.Module, *, images_seen: int, batch: int) -> None:
        """Move the average toward the parameters, once after each optimizer step of `batch` images over all workers.

        `images_seen` counts them too.
        """
        parameters = dict(module.named_parameters())
        current: list[Tensor] = [parameters[name] for name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - self.decay(images_seen, batch))
        self.num_updates += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with the average."""
        parameters = dict(module.named_parameters())
        for name, weight in self.weights.items():
            parameters[name].copy_(weight)

    def restore(self, weights: Mapping[str, Tensor], *, num_updates: int) -> None:
        """Take over an average after `num_updates` updates, on this object's devices and in its types."""
        if found := misfits(weights, self.weights):
            raise InvalidValue(f"these EMA weights belong to another network: {found}")
        for name, weight in weights.items():
            self.weights[name].copy_(weight)
        self.num_updates = num_updates
