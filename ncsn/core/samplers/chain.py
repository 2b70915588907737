"""What the samplers do, `sample(sampler, network, x=start, sigmas=..., noise=..., on_level=...) -> x`, at which levels.

The state never leaves [B, C, H, W], an image depends only on its own start and noise, and nothing is clamped. `denoise`
means the same everywhere: the result is x + sigma_L^2 s(x) at the last level, or still carries its noise.

Under guidance in a band of sigma the score jumps at the band's ends. A sampler that combines scores of several sigmas
takes them of one field (`ncsn.core.samplers.langevin.field_of`), or loses its order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import assert_never

import torch
from torch import Tensor

from ncsn.core.images import DataMoments, moment_matched
from ncsn.core.keyed_random import JoinedNoise, KeyedNoise
from ncsn.core.losses import ScoreFunction
from ncsn.core.samplers.langevin import (
    Fields,
    NoiseSource,
    OnLevel,
    annealed_langevin,
    field_of,
    langevin_step,
    score_at_level,
)
from ncsn.core.samplers.settings import (
    AnnealedLangevin,
    AnySampler,
    Consistency,
    DpmSolver,
    KarrasHeun,
    Langevin,
    Spacing,
)
from ncsn.errors import InvalidValue

_START_DRAW = 2**31  # far beyond the draws of any chain
RHO = 7.0  # exponent of the karras grid, as in the paper

Levels = tuple[list[float], list[int] | None]  # sigmas, descending, and their indices if they are the network's own


def start(sampler: AnySampler, moments: DataMoments, *, sigma_1: float, noise: KeyedNoise | JoinedNoise) -> Tensor:
    """First state of the chain: uniform pixels, or a normal draw with the moments of the data plus noise."""
    if sampler.uniform_start:
        return noise.uniform(0)
    return moment_matched(moments, sigma=sigma_1, z=noise(_START_DRAW))


@torch.no_grad()
def sample(
    sampler: AnySampler,
    network: ScoreFunction | Fields,
    *,
    x: Tensor,
    sigmas: Tensor,
    noise: NoiseSource,
    on_level: OnLevel | None = None,
) -> Tensor:
    """Run the chain of a network in eval mode, whose levels [L] descend.

    Args:
        x: Start [B, C, H, W]; it is not changed.
        noise: Number of a draw -> standard normal tensor of x's shape.
        on_level: Called with (k, x) when the k-th visited level is done; by ODE solvers, when it is reached.
    """
    grid, on_level = LevelGrid(network, *_levels(sampler, sigmas)), on_level or (lambda _level, _x: None)
    match sampler:
        case AnnealedLangevin():
            # A loop of its own, which inpainting shares, with its own denoising.
            return annealed_langevin(
                network,
                x=x,
                sigmas=torch.tensor(grid.sigmas, dtype=torch.float64),
                epsilon=sampler.epsilon,
                steps_per_level=sampler.steps_per_level,
                noise=noise,
                denoise=sampler.denoise,
                consistent=sampler.consistent,
                on_level=on_level,
            )
        case Langevin():
            for step in range(sampler.num_steps):
                x = langevin_step(x, score=grid.score(x, 0), step_size=sampler.step_size, z=noise(step))
            on_level(0, x)
        case KarrasHeun():
            share = min(sampler.churn / sampler.num_steps, math.sqrt(2) - 1)
            for k, (sigma, lower) in enumerate(pairwise(grid.sigmas)):
                on_level(k, x)
                field, raised = field_of(network, sigma), sigma * (1 + share)
                if raised > sigma:
                    x = x.add(noise(k), alpha=math.sqrt(raised**2 - sigma**2))
                slope = score_at_sigma(field, x, sigma=raised).mul_(-raised)
                ahead = score_at_sigma(field, torch.add(x, slope, alpha=lower - raised), sigma=lower)
                x = torch.add(x, slope.add_(ahead, alpha=-lower), alpha=0.5 * (lower - raised))
            on_level(len(grid.sigmas) - 1, x)
        case DpmSolver():
            x = _dpm_solver(sampler, grid, x, noise=noise, on_level=on_level)
        case Consistency():
            for k, lower in enumerate(grid.sigmas[1:]):
                x = grid.denoised(x, k)
                on_level(k, x)
                x = x.add(noise(k), alpha=lower)
            on_level(len(grid.sigmas) - 1, x)
        case _:
            assert_never(sampler)
    return grid.denoised(x, -1) if sampler.denoise else x


def visited(sampler: AnySampler, sigmas: Tensor) -> list[float]:
    """The sigma of each level that `on_level` is called for, given the network's levels [L]."""
    return _levels(sampler, sigmas)[0]


def _levels(sampler: AnySampler, sigmas: Tensor) -> Levels:
    match sampler:
        case AnnealedLangevin():
            own = list(range(len(sigmas)))
        case Langevin(level=level):
            if not -len(sigmas) <= level < len(sigmas):
                raise InvalidValue(f"level must be within the {len(sigmas)} levels 0 to {len(sigmas) - 1}, got {level}")
            own = [level % len(sigmas)]
        case KarrasHeun():
            return spaced_sigmas(sigmas, sampler.num_steps, spacing="karras"), None
        case DpmSolver(num_levels=None):
            return spaced_sigmas(sigmas, sampler.num_steps, spacing=sampler.spacing), None
        case Consistency(sigmas=tuple(lower)):
            return [float(sigmas[0]), *lower], None
        case Consistency():
            raise InvalidValue("sigmas must be numbers here, see Consistency.placed, got auto")
        case DpmSolver():
            own = choose_levels(sigmas, sampler.num_levels, spacing=sampler.spacing)
        case _:
            assert_never(sampler)
    return sigmas[own].tolist(), own


def _dpm_solver(sampler: DpmSolver, grid: LevelGrid, x: Tensor, *, noise: NoiseSource, on_level: OnLevel) -> Tensor:
    """Each step integrates the denoised image D along the ODE, or the SDE.

    With h = ln(sigma_i / sigma_{i+1}) the ODE has the solution x_{i+1} = (sigma_{i+1} / sigma_i) x_i + integral over u
    from 0 to h of e^(u - h) D(u). D is replaced by its value in the middle of the step, on the line through its last
    two values: a multistep method with one evaluation each. Only values of one smooth score function are combined.
    """
    older: tuple[float, Tensor] | None = None  # the last denoised image, and its place from the current point
    for k, (sigma, lower) in enumerate(pairwise(grid.sigmas)):
        on_level(k, x)
        h, denoised = math.log(sigma / lower), grid.denoised(x, k)
        total = -math.expm1(-(1 + sampler.eta) * h)
        x = x * (lower / sigma * math.exp(-sampler.eta * h))
        if older is None:
            x.add_(denoised, alpha=total)
        else:
            place, value = older
            x.add_(denoised, alpha=total * ((h / 2 - place) / (0.0 - place)))
            x.add_(value, alpha=total * (h / 2 / place))
        if sampler.eta > 0:
            x.add_(noise(k), alpha=lower * math.sqrt(-math.expm1(-2 * sampler.eta * h)))
        one_field = field_of(grid.network, sigma) is field_of(grid.network, lower)
        older = (-h, denoised) if sampler.order == 2 and one_field else None
    on_level(len(grid.sigmas) - 1, x)
    return x


@dataclass(frozen=True)
class LevelGrid:
    """Levels at which a sampler evaluates a network: by index, or by sigma where `indices` is None."""

    network: ScoreFunction | Fields
    sigmas: list[float]  # descending
    indices: list[int] | None

    def score(self, x: Tensor, k: int) -> Tensor:
        """Score of a batch at grid position k, by the function that holds there."""
        sigma = self.sigmas[k]
        if self.indices is None:
            return score_at_sigma(field_of(self.network, sigma), x, sigma=sigma)
        return score_at_level(self.network, x, level=self.indices[k], sigma=sigma)

    def denoised(self, x: Tensor, k: int) -> Tensor:
        """Tweedie's x + sigma^2 s(x) at grid position k."""
        return torch.add(x, self.score(x, k), alpha=self.sigmas[k] ** 2)


def choose_levels(sigmas: Tensor, count: int | None, *, spacing: Spacing = "geometric") -> list[int]:
    """Indices of `count` of the levels [L], first and last among them; None, or more than L, for all.

    A grid is laid over the range, evenly in log sigma or (`karras`) in sigma^(1/7), and each of its points moved to
    the nearest level in log sigma. Points that meet at one level become one with `karras`; `geometric` takes the next
    free level, so that `count` are returned.
    """
    total = len(sigmas)
    if count is None or count >= total:
        return list(range(total))
    if count < 2:
        raise InvalidValue(f"at least the first and the last level must be used, got num_levels = {count}")
    logs = sigmas.detach().cpu().double().log()
    if spacing == "karras":
        grid = torch.tensor(spaced_sigmas(sigmas, count, spacing=spacing), dtype=torch.float64).log()
    else:
        grid = torch.linspace(float(logs[0]), float(logs[-1]), count, dtype=torch.float64)
    nearest: list[int] = (grid[:, None] - logs).abs().argmin(dim=1).tolist()
    if spacing == "karras":
        return sorted(set(nearest))
    for k in range(1, count):
        nearest[k] = min(max(nearest[k], nearest[k - 1] + 1), total - count + k)
    return nearest


def spaced_sigmas(sigmas: Tensor, num_steps: int, *, spacing: Spacing) -> list[float]:
    """A grid of `num_steps` points over the range of the levels [L], which need not be among them.

    The `karras` grid is that of Karras et al. 2022, equation 5, without the 0 at its end; both ends are exact.
    """
    if num_steps < 2:
        raise InvalidValue(f"the grid needs at least 2 steps, got {num_steps}")
    first, last = float(sigmas[0]), float(sigmas[-1])
    if spacing == "karras":
        high, low = first ** (1 / RHO), last ** (1 / RHO)
        inner = [(high + k / (num_steps - 1) * (low - high)) ** RHO for k in range(1, num_steps - 1)]
        return [first, *inner, last]
    even = torch.linspace(math.log(first), math.log(last), num_steps, dtype=torch.float64)
    values: list[float] = even.exp().tolist()
    return values


def score_at_sigma(network: ScoreFunction, x: Tensor, *, sigma: float) -> Tensor:
    """Score of a batch at any sigma, in x's type."""
    sigmas = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
    return network(x, sigma=sigmas).to(x.dtype)
