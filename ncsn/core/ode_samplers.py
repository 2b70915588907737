"""Samplers that solve the probability-flow ODE; calling convention and `denoise` as in `ncsn.core.samplers`.

An ODE does not forget its start, see `ncsn.core.starts`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ncsn.core.level_grid import LevelGrid, karras_sigmas, score_at_sigma

if TYPE_CHECKING:
    from ncsn.core.langevin import NoiseSource, OnLevel
    from ncsn.core.level_grid import Spacing
    from ncsn.core.losses import ScoreFunction


@dataclass(frozen=True)
class ProbabilityFlow:
    """The ODE dx/dsigma = -sigma s(x) on the network's own levels (Song et al. 2021; Karras et al. 2022, equation 1).

    Attributes:
        method: `euler`, one NFE per level, or `heun`, second order, two.
        num_levels: Use so many of the network's levels; None for all.
        spacing: How they spread over the range: `geometric`, evenly in log sigma; `karras`, evenly in sigma^(1/7), and
            then moved to the nearest level of the network, which can make them fewer.
        denoise: See the module. It is the Euler step to sigma = 0.
    """

    method: Literal["euler", "heun"] = "heun"
    num_levels: int | None = None
    spacing: Spacing = "geometric"
    denoise: bool = True

    def num_evaluations(self, num_levels: int) -> int:
        """NFE per image; an upper bound with `karras` spacing."""
        steps = min(self.num_levels or num_levels, num_levels) - 1
        return steps * (2 if self.method == "heun" else 1) + self.denoise

    @torch.no_grad()
    def __call__(
        self,
        network: ScoreFunction,
        *,
        x: Tensor,
        sigmas: Tensor,
        noise: NoiseSource,  # noqa: ARG002 - the convention of all samplers
        on_level: OnLevel | None = None,
    ) -> Tensor:
        """Solve the ODE from the first level to the last; `noise` is not used."""
        grid = LevelGrid.subset(network, sigmas, self.num_levels, spacing=self.spacing)
        last = len(grid.sigmas) - 1
        for k, sigma in enumerate(grid.sigmas):
            if on_level is not None:
                on_level(k, x)
            if k == last:
                break
            lower = grid.sigmas[k + 1]
            slope = grid.score(x, k).mul_(-sigma)
            if self.method == "heun":
                ahead = grid.score(torch.add(x, slope, alpha=lower - sigma), k + 1)
                slope = slope.add_(ahead, alpha=-lower).mul_(0.5)
            x = torch.add(x, slope, alpha=lower - sigma)
        return grid.denoised(x, last) if self.denoise else x


@dataclass(frozen=True)
class KarrasHeun:
    """The stochastic Heun sampler of Karras et al. 2022 (Algorithm 2), for continuous networks.

    Attributes:
        num_steps: N; NFE is 2N - 1.
        rho: Exponent of the grid sigma_k = (sigma_1^(1/rho) + k/(N-1) (sigma_L^(1/rho) - sigma_1^(1/rho)))^rho.
        churn: S_churn: total noise added again on the way, 0 for the deterministic ODE.
        churn_min: Lowest sigma with churn.
        churn_max: Highest sigma with churn.
        churn_noise: S_noise: standard deviation of the normal numbers used for it.
        denoise: See the module. It is the step to sigma = 0.
    """

    num_steps: int = 18
    rho: float = 7.0
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0
    denoise: bool = True

    def num_evaluations(self, num_levels: int) -> int:  # noqa: ARG002 - the convention of all samplers
        """NFE per image, whatever the number of levels."""
        return 2 * (self.num_steps - 1) + self.denoise

    @torch.no_grad()
    def __call__(
        self, network: ScoreFunction, *, x: Tensor, sigmas: Tensor, noise: NoiseSource, on_level: OnLevel | None = None
    ) -> Tensor:
        """Solve from the largest to the smallest of `sigmas`, of which only these two are used."""
        levels = karras_sigmas(float(sigmas[0]), float(sigmas[-1]), self.num_steps, rho=self.rho)
        for k, sigma in enumerate(levels):
            if on_level is not None:
                on_level(k, x)
            if k == len(levels) - 1:
                break
            raised = sigma * (1 + self._share(sigma))
            if raised > sigma:
                x = x.add(noise(k), alpha=self.churn_noise * math.sqrt(raised**2 - sigma**2))
            lower = levels[k + 1]
            slope = score_at_sigma(network, x, sigma=raised).mul_(-raised)
            ahead = score_at_sigma(network, torch.add(x, slope, alpha=lower - raised), sigma=lower)
            x = torch.add(x, slope.add_(ahead, alpha=-lower), alpha=0.5 * (lower - raised))
        last = levels[-1]
        return torch.add(x, score_at_sigma(network, x, sigma=last), alpha=last**2) if self.denoise else x

    def _share(self, sigma: float) -> float:
        if not self.churn_min <= sigma <= self.churn_max:
            return 0.0
        return min(self.churn / self.num_steps, math.sqrt(2) - 1)
