"""Samplers that draw noise at every step: Langevin dynamics and reverse diffusions; see `ncsn.core.samplers.base`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Literal

import torch
from torch import Tensor

from ncsn.core.samplers.base import Sampler
from ncsn.core.samplers.langevin import NoiseSource, OnLevel, annealed_langevin, langevin_step
from ncsn.core.samplers.level_grid import LevelGrid, Levels, own_levels, spaced_sigmas
from ncsn.errors import InvalidValue


@dataclass(frozen=True)
class AnnealedLangevin(Sampler):
    """Annealed Langevin dynamics (2019, Algorithm 1), see `annealed_langevin`."""

    epsilon: float  # step size at the last level
    steps_per_level: int
    denoise: bool = True
    consistent: bool = False  # see `level_steps`

    kind = "annealed_langevin"
    length = "steps_per_level"
    uniform_start = True

    def num_evaluations(self, num_levels: int) -> int:
        """See `Sampler`."""
        return num_levels * self.steps_per_level + self.denoise

    def _levels(self, sigmas: Tensor) -> Levels:
        return own_levels(sigmas)

    def _run(self, grid: LevelGrid, x: Tensor, *, noise: NoiseSource, on_level: OnLevel) -> Tensor:
        return annealed_langevin(
            grid.network,
            x=x,
            sigmas=torch.tensor(grid.sigmas, dtype=torch.float64),
            epsilon=self.epsilon,
            steps_per_level=self.steps_per_level,
            noise=noise,
            denoise=self.denoise,
            consistent=self.consistent,
            on_level=on_level,
        )


@dataclass(frozen=True)
class Langevin(Sampler):
    """Langevin dynamics at one noise level (2019, equation 4)."""

    level: int  # 0 = most noise; negative ones count from the last
    step_size: float  # a in x + a s + sqrt(2a) z
    num_steps: int
    denoise: bool

    kind = "langevin"
    length = "num_steps"
    uniform_start = True

    def num_evaluations(self, num_levels: int) -> int:  # noqa: ARG002 - one level only
        """See `Sampler`."""
        return self.num_steps + self.denoise

    def _levels(self, sigmas: Tensor) -> Levels:
        if not -len(sigmas) <= self.level < len(sigmas):
            raise InvalidValue(
                f"level must be within the {len(sigmas)} levels 0 to {len(sigmas) - 1}, got {self.level}"
            )
        return [float(sigmas[self.level])], [self.level % len(sigmas)]

    def _run(self, grid: LevelGrid, x: Tensor, *, noise: NoiseSource, on_level: OnLevel) -> Tensor:
        for step in range(self.num_steps):
            x = langevin_step(x, score=grid.score(x, 0), step_size=self.step_size, z=noise(step))
        on_level(0, x)
        return grid.denoised(x, 0) if self.denoise else x


@dataclass(frozen=True)
class ConsistentAnnealed(Sampler):
    """Consistent annealed sampling (Jolicoeur-Martineau et al. 2020, Algorithm 2).

    Each level takes one step and adds the noise that leaves exactly the next level's sigma. Without `denoise` the last
    step still removes the share eta of the last level's noise.
    """

    epsilon: float  # eta = epsilon / sigma_L^2 must be in [1 - q, 1 + q] for the ratio q < 1 of neighboring sigmas
    refine: int = 1  # makes the grid this many times finer; above 1 the network must be continuous
    denoise: bool = True

    kind = "consistent_annealed"

    def num_evaluations(self, num_levels: int) -> int:
        """See `Sampler`."""
        return (num_levels - 1) * self.refine + 1 + self.denoise

    def _levels(self, sigmas: Tensor) -> Levels:
        if self.refine == 1:
            return own_levels(sigmas)
        return spaced_sigmas(sigmas, (len(sigmas) - 1) * self.refine + 1, spacing="geometric"), None

    def _run(self, grid: LevelGrid, x: Tensor, *, noise: NoiseSource, on_level: OnLevel) -> Tensor:
        eta, beta = self._coefficients(grid.sigmas)
        last = len(grid.sigmas) - 1
        for k, sigma in enumerate(grid.sigmas):
            x = torch.add(x, grid.score(x, k), alpha=eta * sigma**2)
            if k < last:
                x.add_(noise(k), alpha=beta * grid.sigmas[k + 1])
            on_level(k, x)
        return grid.denoised(x, -1) if self.denoise else x

    def _coefficients(self, sigmas: list[float]) -> tuple[float, float]:
        q = (sigmas[-1] / sigmas[0]) ** (1 / (len(sigmas) - 1))
        if any(abs(b / a / q - 1) > 1e-3 for a, b in pairwise(sigmas)):
            raise InvalidValue(
                "consistent annealed sampling needs noise levels of constant ratio (a geometric schedule)"
            )
        eta = self.epsilon / sigmas[-1] ** 2
        if not 1 - q <= eta <= 1 + q:
            low, high = ((1 + sign * q) * sigmas[-1] ** 2 for sign in (-1, 1))
            raise InvalidValue(
                f"epsilon must be within {low:.4g} and {high:.4g} for these noise levels, got {self.epsilon:g}"
            )
        return eta, math.sqrt(max(0.0, 1 - ((1 - eta) / q) ** 2))


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """Predictor-corrector sampling of the variance-exploding SDE (Song et al. 2021, Algorithm 2).

    Langevin corrector steps at each level, then the predictor's step to the next. A corrector step has size
    2 (snr |z| / |s|)^2 with the norms of each image, not of the batch, so that images do not depend on each other.
    """

    predictor: Literal["reverse_diffusion", "ancestral"] = "reverse_diffusion"  # ancestral adds less noise
    corrector_steps: int = 1
    snr: float = 0.16
    num_levels: int | None = None  # levels used, evenly spread in log sigma; None for all
    denoise: bool = True

    kind = "predictor_corrector"

    def num_evaluations(self, num_levels: int) -> int:
        """See `Sampler`."""
        levels = min(self.num_levels or num_levels, num_levels)
        return levels * (self.corrector_steps + 1) - (not self.denoise)

    def _levels(self, sigmas: Tensor) -> Levels:
        return own_levels(sigmas, self.num_levels)

    def _run(self, grid: LevelGrid, x: Tensor, *, noise: NoiseSource, on_level: OnLevel) -> Tensor:
        last, draws = len(grid.sigmas) - 1, map(noise, count())
        for k in range(len(grid.sigmas)):
            for _ in range(self.corrector_steps):
                x = self._correct(x, score=grid.score(x, k), z=next(draws))
            on_level(k, x)
            if k < last:
                x = self._predict(x, score=grid.score(x, k), sigmas=grid.sigmas[k : k + 2], z=next(draws))
        # The predictor's last step, to sigma = 0 without noise, is the denoising.
        return grid.denoised(x, -1) if self.denoise else x

    def _correct(self, x: Tensor, *, score: Tensor, z: Tensor) -> Tensor:
        ratio = z.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
        step = (2 * (self.snr * ratio).square()).view(-1, *[1] * (x.ndim - 1))
        return torch.addcmul(x, score, step).addcmul_(z, (2 * step).sqrt())

    def _predict(self, x: Tensor, *, score: Tensor, sigmas: list[float], z: Tensor) -> Tensor:
        sigma, lower = sigmas
        variance = sigma**2 - lower**2
        added = variance * (lower / sigma) ** 2 if self.predictor == "ancestral" else variance
        return torch.add(x, score, alpha=variance).add_(z, alpha=math.sqrt(added))
