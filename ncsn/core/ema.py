"""The running average of the weights, which generates the images, and averages that are put together after training.

The power-function average of exponent g at time t has the weight profile p(tau) = (g + 1) tau^g / t^(g + 1) on [0, t].
Its relative width, the standard deviation of the profile over t, names it. Of snapshots of two such averages one of any
width is put together (Karras et al. 2024, section 3 and appendix C).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ncsn.core.networks.transfer import misfits
from ncsn.errors import InvalidValue


class EmaProfile(Protocol):
    """How much of the running average a step keeps."""

    def decay(self, *, images_seen: int, batch: int) -> float:
        """The factor m in [0, 1] of the average at a step of `batch` images, `images_seen` counting them too."""


@dataclass(frozen=True)
class StepDecay:
    """The same factor m at each step, in [0, 1): the average depends on the batch size."""

    per_step: float

    def decay(self, *, images_seen: int, batch: int) -> float:  # noqa: ARG002
        return self.per_step


@dataclass(frozen=True)
class HalfLife:
    """Weights lose half of their influence over h = min(H, r n) images, of n seen (Karras et al. 2022).

    While r n is the smaller, this is the power-function average of exponent ln 2 / r - 1 (Karras et al. 2024).
    """

    images: float  # H
    ramp_up: float | None  # r; None for h = H

    def decay(self, *, images_seen: int, batch: int) -> float:
        half_life = self.images if self.ramp_up is None else min(self.images, self.ramp_up * images_seen)
        decay: float = 0.5 ** (batch / half_life)
        return decay


@dataclass(frozen=True)
class PowerFunction:
    """The average (g + 1) / t^(g + 1) times the integral over tau^g theta(tau), of exponent g (Karras et al. 2024).

    It forgets the initial weights at the first step, and its memory grows with the training.
    """

    exponent: float

    def decay(self, *, images_seen: int, batch: int) -> float:
        decay: float = (1 - batch / images_seen) ** (self.exponent + 1)
        return decay


class Ema:
    """Running average w <- m w + (1 - m) parameter of a network's weights (Song & Ermon 2020, technique 5).

    It starts from a copy of the parameters of the network, which is no DDP wrapper; `profile` gives m.
    """

    def __init__(self, module: nn.Module, profile: EmaProfile) -> None:
        self.profile = profile
        self.num_updates = 0
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in module.named_parameters()
        }

    @torch.no_grad()
    def update(self, module: nn.Module, *, images_seen: int, batch: int) -> None:
        """Move the average toward the parameters, once after each optimizer step of `batch` images over all workers.

        `images_seen` counts them too.
        """
        parameters: list[Tensor] = [parameter for _, parameter in self._matched(module)]
        decay = self.profile.decay(images_seen=images_seen, batch=batch)
        torch._foreach_lerp_(list(self.weights.values()), parameters, 1 - decay)
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
        """Restore a `state_dict`, on this object's devices and in its types."""
        weights: Mapping[str, Tensor] = state["weights"]
        if found := misfits(weights, self.weights):
            raise InvalidValue(f"these EMA weights belong to another network: {found}")
        for name, weight in weights.items():
            self.weights[name].copy_(weight)
        self.num_updates = int(state["num_updates"])

    def _matched(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        named = list(module.named_parameters())
        if [name for name, _ in named] != list(self.weights):
            raise ValueError("the module's parameters are not those that the running average was made from")
        return named


Array = NDArray[np.float64]

WIDEST = math.sqrt(1 / 12)  # relative width of the plain mean, whose exponent is 0


def relative_width(exponent: float) -> float:
    """The relative width of the profile of exponent g >= 0."""
    return math.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3)))


def exponent_of(width: float) -> float:
    """The exponent g >= 0 of the profile with this relative width, in (0, `WIDEST`]."""
    if not 0 < width <= WIDEST:
        raise InvalidValue(f"a relative width is more than 0 and at most {WIDEST:.4f}, got {width}")
    square = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - square, 12.0 - square])
    return max(0.0, float(roots.real.max()))


@dataclass(frozen=True)
class Profile:
    """A power-function average."""

    exponent: float
    time: float  # of its end, more than 0, such as images seen


def inner_product(one: Profile, other: Profile) -> float:
    """Integral of the product of two weight profiles."""
    first, last = sorted((one, other), key=lambda profile: profile.time)
    g, h = one.exponent, other.exponent
    return (g + 1) * (h + 1) * math.pow(first.time / last.time, last.exponent) / ((g + h + 1) * last.time)


@dataclass(frozen=True)
class Reconstruction:
    """How to put an average together from stored ones."""

    coefficients: Array  # of the stored averages [N]
    error: float  # relative L2 error of the weight profile


def reconstruction(stored: Sequence[Profile], target: Profile) -> Reconstruction:
    """The combination of stored averages whose profile is nearest to that of `target` in the least-squares sense.

    The coefficients are held to a sum of one, so that weights which do not change are kept. Karras
    et al. do not hold them, which with few snapshots makes smooth weights a few percent too small.
    """
    count = len(stored)
    gram = np.array([[inner_product(one, other) for other in stored] for one in stored])
    right = np.array([inner_product(one, target) for one in stored])
    norm = inner_product(target, target)
    # In units of the target's own norm, so that the row of the sum has a like size.
    matrix, sides = gram / norm, right / norm
    matrix = np.block([[matrix, np.ones((count, 1))], [np.ones((1, count)), np.zeros((1, 1))]])
    sides = np.append(sides, 1.0)
    found: Array = np.asarray(np.linalg.solve(matrix, sides)[:count], np.float64)
    square = (found @ gram @ found - 2 * found @ right) / norm + 1
    return Reconstruction(found, math.sqrt(max(square, 0.0)))
