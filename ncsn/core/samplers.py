"""Samplers with one calling convention: `sampler(network, x=start, sigmas=..., noise=..., on_level=...) -> x`.

A sampler is a frozen set of settings. Its state never leaves [B, C, H, W], an image depends only on its own start and
noise, and nothing is clamped. `denoise` means the same everywhere: the result has the noise of the last level taken
out by x + sigma_L^2 s(x), or still carries it. `on_level(k, x)` is called with position k of the sampler's own
sequence of levels when that level is done.

All but the Langevin samplers need a start distributed as data plus noise of the first sigma, see `ncsn.core.starts`.
Those that solve an ODE are in `ncsn.core.ode_samplers`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from ncsn.core.langevin import annealed_langevin, denoise_step, langevin_step, score_at_level
from ncsn.core.level_grid import LevelGrid

if TYPE_CHECKING:
    from ncsn.core.langevin import NoiseSource, OnLevel
    from ncsn.core.losses import ScoreFunction


class Sampler(Protocol):
    """What every sampler is."""

    def num_evaluations(self, num_levels: int) -> int:
        """NFE per image for a network of so many levels."""

    def __call__(
        self, network: ScoreFunction, *, x: Tensor, sigmas: Tensor, noise: NoiseSource, on_level: OnLevel | None = None
    ) -> Tensor:
        """Run the chain.

        Args:
            network: The score network, in eval mode.
            x: Start [B, C, H, W]; it is not changed.
            sigmas: The network's noise levels [L], descending.
            noise: Source of the normal draws, by number.
            on_level: Receives each level done.

        Returns:
            The images [B, C, H, W], not clamped to [0, 1].
        """


@dataclass(frozen=True)
class Langevin:
    """Langevin dynamics at one noise level (2019, equation 4).

    Attributes:
        level: The level, 0 = most noise; negative ones count from the last.
        step_size: a in x + a s + sqrt(2a) z.
        num_steps: Number of steps.
        denoise: See the module.
    """

    level: int
    step_size: float
    num_steps: int
    denoise: bool = False

    def num_evaluations(self, num_levels: int) -> int:  # noqa: ARG002 - the convention of all samplers
        """NFE per image."""
        return self.num_steps + self.denoise

    @torch.no_grad()
    def __call__(
        self, network: ScoreFunction, *, x: Tensor, sigmas: Tensor, noise: NoiseSource, on_level: OnLevel | None = None
    ) -> Tensor:
        """Run the chain; `on_level` is called once."""
        if not -len(sigmas) <= self.level < len(sigmas):
            raise ValueError(f"level must be within the {len(sigmas)} levels 0 to {len(sigmas) - 1}, got {self.level}")
        level = self.level % len(sigmas)
        for step in range(self.num_steps):
            score = score_at_level(network, x, level=level)
            x = langevin_step(x, score=score, step_size=self.step_size, z=noise(step))
        if on_level is not None:
            on_level(0, x)
        return denoise_step(network, x, level=level, sigma=float(sigmas[level])) if self.denoise else x


@dataclass(frozen=True)
class AnnealedLangevin:
    """Annealed Langevin dynamics (2019, Algorithm 1), see `annealed_langevin`.

    Attributes:
        epsilon: Step size at the last level.
        steps_per_level: T.
        denoise: See the module.
        consistent: See `level_steps`.
    """

    epsilon: float
    steps_per_level: int
    denoise: bool = True
    consistent: bool = False

    def num_evaluations(self, num_levels: int) -> int:
        """NFE per image."""
        return num_levels * self.steps_per_level + self.denoise

    def __call__(
        self, network: ScoreFunction, *, x: Tensor, sigmas: Tensor, noise: NoiseSource, on_level: OnLevel | None = None
    ) -> Tensor:
        """Run the chain."""
        return annealed_langevin(
            network,
            x=x,
            sigmas=sigmas,
            epsilon=self.epsilon,
            steps_per_level=self.steps_per_level,
            noise=noise,
            denoise=self.denoise,
            consistent=self.consistent,
            on_level=on_level,
        )


@dataclass(frozen=True)
class ConsistentAnnealed:
    """Consistent annealed sampling (Jolicoeur-Martineau et al. 2020, Algorithm 2).

    Each level takes one step and adds just so much noise that the image carries exactly the next level's sigma.

    Attributes:
        epsilon: Step size at the last level; eta = epsilon / sigma_L^2 must lie in [1 - q, 1 + q] for the ratio
            q < 1 of neighbouring sigmas.
        refine: Steps per level: the grid is made so many times finer, for which the network must be continuous.
        denoise: See the module. Without it the last step still takes out the share eta of the last level's noise.
    """

    epsilon: float
    refine: int = 1
    denoise: bool = True

    def num_evaluations(self, num_levels: int) -> int:
        """NFE per image."""
        return (num_levels - 1) * self.refine + 1 + self.denoise

    @torch.no_grad()
    def __call__(
        self, network: ScoreFunction, *, x: Tensor, sigmas: Tensor, noise: NoiseSource, on_level: OnLevel | None = None
    ) -> Tensor:
        """Run the chain."""
        grid = (
            LevelGrid.subset(network, sigmas, None)
            if self.refine == 1
            else LevelGrid.refined(network, sigmas, self.refine)
        )
        eta, beta = self._coefficients(grid.sigmas)
        last = len(grid.sigmas) - 1
        for k, sigma in enumerate(grid.sigmas):
            x = torch.add(x, grid.score(x, k), alpha=eta * sigma**2)
            if k < last:
                x.add_(noise(k), alpha=beta * grid.sigmas[k + 1])
            if on_level is not None:
                on_level(k, x)
        return grid.denoised(x, last) if self.denoise else x

    def _coefficients(self, sigmas: list[float]) -> tuple[float, float]:
        q = (sigmas[-1] / sigmas[0]) ** (1 / (len(sigmas) - 1))
        if any(abs(b / a / q - 1) > 1e-3 for a, b in pairwise(sigmas)):
            raise ValueError("consistent annealed sampling needs noise levels of constant ratio (a geometric schedule)")
        eta = self.epsilon / sigmas[-1] ** 2
        if not 1 - q <= eta <= 1 + q:
            low, high = ((1 + sign * q) * sigmas[-1] ** 2 for sign in (-1, 1))
            raise ValueError(
                f"epsilon must be within {low:.4g} and {high:.4g} for these noise levels, got {self.epsilon:g}"
            )
        return eta, math.sqrt(max(0.0, 1 - ((1 - eta) / q) ** 2))


@dataclass(frozen=True)
class PredictorCorrector:
    """Predictor-corrector sampling of the variance-exploding SDE (Song et al. 2021, Algorithm 2).

    At each level Langevin corrector steps, then the predictor's step to the next. A corrector step has size
    2 (snr |z| / |s|)^2 with the norms of each image, not of the batch, so that images do not depend on each other.

    Attributes:
        predictor: `reverse_diffusion` or `ancestral`, which adds less noise.
        corrector_steps: Langevin steps per level; 0 leaves the predictor alone.
        snr: r of the corrector.
        num_levels: Use so many of the network's levels, evenly spread in log sigma; None for all.
        denoise: See the module. The predictor's last step to sigma = 0 without its noise is the denoising.
    """

    predictor: Literal["reverse_diffusion", "ancestral"] = "reverse_diffusion"
    corrector_steps: int = 1
    snr: float = 0.16
    num_levels: int | None = None
    denoise: bool = True

    def num_evaluations(self, num_levels: int) -> int:
        """NFE per image."""
        levels = min(self.num_levels or num_levels, num_levels)
        return levels * (self.corrector_steps + 1) - (not self.denoise)

    @torch.no_grad()
    def __call__(
        self, network: ScoreFunction, *, x: Tensor, sigmas: Tensor, noise: NoiseSource, on_level: OnLevel | None = None
    ) -> Tensor:
        """Run the chain."""
        grid = LevelGrid.subset(network, sigmas, self.num_levels)
        last, draws = len(grid.sigmas) - 1, 0
        for k in range(len(grid.sigmas)):
            for _ in range(self.corrector_steps):
                x = self._correct(x, score=grid.score(x, k), z=noise(draws))
                draws += 1
            if on_level is not None:
                on_level(k, x)
            if k < last:
                x = self._predict(x, score=grid.score(x, k), sigmas=grid.sigmas[k : k + 2], z=noise(draws))
                draws += 1
        return grid.denoised(x, last) if self.denoise else x

    def _correct(self, x: Tensor, *, score: Tensor, z: Tensor) -> Tensor:
        ratio = z.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
        step = (2 * (self.snr * ratio).square()).view(-1, *[1] * (x.ndim - 1))
        return torch.addcmul(x, score, step).addcmul_(z, (2 * step).sqrt())

    def _predict(self, x: Tensor, *, score: Tensor, sigmas: list[float], z: Tensor) -> Tensor:
        sigma, lower = sigmas
        variance = sigma**2 - lower**2
        added = variance * (lower / sigma) ** 2 if self.predictor == "ancestral" else variance
        return torch.add(x, score, alpha=variance).add_(z, alpha=math.sqrt(added))
