"""The noise levels that a sampler visits: all or some of the network's own, or any for a continuous network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ncsn.core.langevin import score_at_level

if TYPE_CHECKING:
    from ncsn.core.losses import ScoreFunction

Spacing = Literal["geometric", "karras"]


def karras_sigmas(sigma_1: float, sigma_L: float, num_steps: int, *, rho: float = 7.0) -> list[float]:
    """The grid of Karras et al. 2022, equation 5, without the 0 at its end; both ends are exact."""
    if num_steps < 2:
        raise ValueError(f"the grid needs at least 2 steps, got {num_steps}")
    high, low = sigma_1 ** (1 / rho), sigma_L ** (1 / rho)
    inner = [(high + k / (num_steps - 1) * (low - high)) ** rho for k in range(1, num_steps - 1)]
    return [sigma_1, *inner, sigma_L]


def score_at_sigma(network: ScoreFunction, x: Tensor, *, sigma: float) -> Tensor:
    """Score of a batch at any sigma, in x's type.

    Raises:
        ValueError: The network knows its own levels only.
    """
    score_at = getattr(network, "score_at", None)
    if score_at is None:
        raise ValueError(
            f"{type(network).__name__} knows its own noise levels only; "
            "this sampler needs a network that takes any sigma: kind ncsnv2 or unet"
        )
    score: Tensor = score_at(x, torch.full((len(x),), sigma, dtype=x.dtype, device=x.device))
    return score.to(x.dtype)


def choose_levels(sigmas: Tensor, count: int | None, *, spacing: Spacing = "geometric") -> list[int]:
    """Indices of `count` of the given levels, first and last among them.

    A grid is laid over the range and each of its points moved to the level that is nearest in log sigma. Points that
    meet at one level become one, except that `geometric` then takes the next free level, so that `count` are returned.

    Args:
        sigmas: Levels [L], descending.
        count: Number of levels, at least 2; None, or more than L, for all.
        spacing: Evenly in log sigma or in sigma^(1/7).
    """
    total = len(sigmas)
    if count is None or count >= total:
        return list(range(total))
    if count < 2:
        raise ValueError(f"at least the first and the last level must be used, got num_levels = {count}")
    logs = sigmas.detach().cpu().double().log()
    if spacing == "karras":
        grid = torch.tensor(karras_sigmas(float(sigmas[0]), float(sigmas[-1]), count), dtype=torch.float64).log()
    else:
        grid = torch.linspace(float(logs[0]), float(logs[-1]), count, dtype=torch.float64)
    nearest: list[int] = (grid[:, None] - logs).abs().argmin(dim=1).tolist()
    if spacing == "karras":
        return sorted(set(nearest))
    for k in range(1, count):
        nearest[k] = min(max(nearest[k], nearest[k - 1] + 1), total - count + k)
    return nearest


@dataclass(frozen=True)
class LevelGrid:
    """Levels at which a sampler evaluates a network, by index or, on a grid finer than its own, by sigma.

    Attributes:
        network: The score network.
        sigmas: Noise levels, descending.
        indices: The network's index of each, or None to go by sigma.
    """

    network: ScoreFunction
    sigmas: list[float]
    indices: list[int] | None

    @classmethod
    def subset(
        cls,
        network: ScoreFunction,
        sigmas: Tensor,
        count: int | None,
        *,
        spacing: Spacing = "geometric",
    ) -> LevelGrid:
        """So many of the network's own levels, see `choose_levels`."""
        indices = choose_levels(sigmas, count, spacing=spacing)
        values = sigmas.tolist()
        return cls(network, [values[i] for i in indices], indices)

    @classmethod
    def refined(cls, network: ScoreFunction, sigmas: Tensor, refine: int) -> LevelGrid:
        """A geometric grid with `refine` times as many steps; the network must be continuous."""
        count = (len(sigmas) - 1) * refine + 1
        logs = torch.linspace(math.log(sigmas[0]), math.log(sigmas[-1]), count, dtype=torch.float64)
        return cls(network, logs.exp().tolist(), None)

    def score(self, x: Tensor, k: int) -> Tensor:
        """Score of a batch at grid position k."""
        if self.indices is None:
            return score_at_sigma(self.network, x, sigma=self.sigmas[k])
        return score_at_level(self.network, x, level=self.indices[k])

    def denoised(self, x: Tensor, k: int) -> Tensor:
        """Tweedie's x + sigma^2 s(x) at grid position k."""
        return torch.add(x, self.score(x, k), alpha=self.sigmas[k] ** 2)
