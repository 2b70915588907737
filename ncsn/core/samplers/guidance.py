"""Guidance: away from a second score, toward what the first knows beyond it, in a band of noise levels.

The score becomes s_0 + w (s_1 - s_0), and so does the denoised image. w = 1 is no guidance. s_1 is the network with the
class of each image. s_0 is the same network without classes (classifier-free guidance, Ho & Salimans 2022, whose w is
this one minus 1), or a worse network (autoguidance, Karras et al. 2024). That one is asked at the network's levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import inf, sqrt

import torch
from torch import Tensor

from ncsn.core.losses import ScoreFunction


class Guided:
    """A score function with guidance, as samplers take it.

    It is another function of x inside the band low < sigma <= high than outside, so samplers ask for the one that holds
    at a noise level, and a step of theirs stays with that of the level where it starts. The guide has the same levels
    as the network, see `AtLevels`.
    """

    def __init__(
        self, network: ScoreFunction, guide: ScoreFunction, *, weight: float, band: tuple[float, float]
    ) -> None:
        self.network, self.band = network, band if weight != 1 else (0.0, 0.0)

        def inside(x: Tensor, level: Tensor | None = None, *, sigma: Tensor | None = None) -> Tensor:
            # In x's type: under autocast a network of kind ncsn gives bfloat16.
            base, score = (each(x, level, sigma=sigma).to(x.dtype) for each in (guide, network))
            return torch.lerp(base, score, weight)

        self._inside = inside

    def field_at(self, sigma: float) -> ScoreFunction:
        low, high = self.band
        return self._inside if low < sigma <= high else self.network


def band_on_grid(low: float, high: float, grid: Sequence[float]) -> tuple[float, float]:
    """The band low < sigma <= high with its ends moved to the nearest points of a sampler's grid, descending.

    The ends that are returned lie halfway to the next point, so that rounding of a sigma does not decide. An end
    beyond the grid leaves the band open there. Nearest is by ratio.
    """
    first = 0 if high >= grid[0] else _nearest(grid, high)
    end = len(grid) if low < grid[-1] else _nearest(grid, low)
    edges = [inf, *(sqrt(above * below) for above, below in pairwise(grid)), 0.0]
    return edges[end], edges[first]


def _nearest(grid: Sequence[float], sigma: float) -> int:
    return min(range(len(grid)), key=lambda k: max(grid[k] / sigma, sigma / grid[k]))


class AtLevels:
    """A score network for any sigma, at other levels [L] than its own; `sigmas` are on its device."""

    def __init__(self, network: ScoreFunction, sigmas: Tensor) -> None:
        self.network, self.sigmas = network, sigmas

    def __call__(
        self, x: Tensor, level: Tensor | None = None, *, sigma: Tensor | None = None, **conditions: Tensor
    ) -> Tensor:
        """Score at one of the levels, or at any sigma."""
        if level is not None:
            sigma = self.sigmas[level]
        return self.network(x, sigma=sigma, **conditions)
