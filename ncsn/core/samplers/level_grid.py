"""The noise levels that a sampler visits: all or some of the network's own, or any for a continuous network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ncsn.core.losses import ScoreFunction
from ncsn.core.samplers.langevin import Fields, field_of, score_at_level
from ncsn.core.samplers.settings import Spacing
from ncsn.errors import InvalidValue

RHO = 7.0  # exponent of the karras grid, as in the paper

Levels = tuple[list[float], list[int] | None]  # sigmas, descending, and their indices if they are the network's own


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

    def continues(self, k: int) -> bool:
        """Whether the scores at grid positions k and k + 1 are of one smooth function of sigma, see `field_of`."""
        return field_of(self.network, self.sigmas[k]) is field_of(self.network, self.sigmas[k + 1])


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
