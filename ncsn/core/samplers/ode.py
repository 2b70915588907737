"""Samplers that solve the probability-flow ODE, which does not forget its start; see `ncsn.core.samplers.base`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ncsn.core.samplers.base import Sampler
from ncsn.core.samplers.langevin import NoiseSource, OnLevel
from ncsn.core.samplers.level_grid import (
    LevelGrid,
    Levels,
    Spacing,
    field_of,
    own_levels,
    score_at_sigma,
    spaced_sigmas,
)


@dataclass(frozen=True)
class ProbabilityFlow(Sampler):
    """The ODE dx/dsigma = -sigma s(x) on the network's own levels (Song et al. 2021; Karras et al. 2022, equation 1).

    `denoise` is the Euler step to sigma = 0.
    """

    method: Literal["euler", "heun"] = "heun"
    num_levels: int | None = None  # levels used; None for all
    spacing: Spacing = "geometric"  # see `choose_levels`
    denoise: bool = True

    kind = "probability_flow"
    length = "num_levels"
    smallest_length = 2
    descends = True

    def num_evaluations(self, num_levels: int) -> int:
        """See `Sampler`; an upper bound with `karras` spacing."""
        steps = min(self.num_levels or num_levels, num_levels) - 1
        return steps * (2 if self.method == "heun" else 1) + self.denoise

    def _levels(self, sigmas: Tensor) -> Levels:
        return own_levels(sigmas, self.num_levels, spacing=self.spacing)

    def _run(self, grid: LevelGrid, x: Tensor, *, noise: NoiseSource, on_level: OnLevel) -> Tensor:  # noqa: ARG002
        for k, (sigma, lower) in enumerate(pairwise(grid.sigmas)):
            on_level(k, x)
            slope = grid.score(x, k).mul_(-sigma)
            if self.method == "heun":
                ahead = grid.score(torch.add(x, slope, alpha=lower - sigma), k + 1, field=k)
                slope = slope.add_(ahead, alpha=-lower).mul_(0.5)
            x = torch.add(x, slope, alpha=lower - sigma)
        on_level(len(grid.sigmas) - 1, x)
        return grid.denoised(x, -1) if self.denoise else x


@dataclass(frozen=True)
class KarrasHeun(Sampler):
    """The stochastic Heun sampler of Karras et al. 2022 (Algorithm 2), for continuous networks.

    Of the network's levels only the first and the last are used. `denoise` is the step to sigma = 0.
    """

    num_steps: int = 18
    rho: float = 7.0  # exponent of the grid
    churn: float = 0.0  # S_churn: total noise added again on the way; 0 is the deterministic ODE
    churn_min: float = 0.0  # lowest sigma with churn
    churn_max: float = 1e4  # highest sigma with churn
    churn_noise: float = 1.0  # S_noise: standard deviation of what churn adds
    denoise: bool = True

    kind = "karras_heun"
    length = "num_steps"
    smallest_length = 2
    descends = True

    def num_evaluations(self, num_levels: int) -> int:  # noqa: ARG002 - its own grid
        """See `Sampler`."""
        return 2 * (self.num_steps - 1) + self.denoise

    def _levels(self, sigmas: Tensor) -> Levels:
        return spaced_sigmas(sigmas, self.num_steps, spacing="karras", rho=self.rho), None

    def _run(self, grid: LevelGrid, x: Tensor, *, noise: NoiseSource, on_level: OnLevel) -> Tensor:
        for k, (sigma, lower) in enumerate(pairwise(grid.sigmas)):
            on_level(k, x)
            field, raised = field_of(grid.network, sigma), sigma * (1 + self._share(sigma))
            if raised > sigma:
                x = x.add(noise(k), alpha=self.churn_noise * math.sqrt(raised**2 - sigma**2))
            slope = score_at_sigma(field, x, sigma=raised).mul_(-raised)
            ahead = score_at_sigma(field, torch.add(x, slope, alpha=lower - raised), sigma=lower)
            x = torch.add(x, slope.add_(ahead, alpha=-lower), alpha=0.5 * (lower - raised))
        on_level(len(grid.sigmas) - 1, x)
        return grid.denoised(x, -1) if self.denoise else x

    def _share(self, sigma: float) -> float:
        if not self.churn_min <= sigma <= self.churn_max:
            return 0.0
        return min(self.churn / self.num_steps, math.sqrt(2) - 1)
