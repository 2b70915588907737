"""Samplers that reuse earlier evaluations of the network, so that each grid point costs one.

With t = -ln sigma, h = ln(sigma_i / sigma_{i+1}) and the denoised image D, the probability-flow ODE has the solution
x_{i+1} = (sigma_{i+1} / sigma_i) x_i + integral over u from 0 to h of e^(u - h) D(t_i + u). These samplers replace D by
a polynomial through its latest values.

A polynomial needs one smooth D. Where a score function is another one in a band of sigma (guidance), only the values of
one are combined; see `ncsn.core.samplers.level_grid.field_of`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ncsn.core.samplers.base import Sampler
from ncsn.core.samplers.langevin import NoiseSource, OnLevel
from ncsn.core.samplers.level_grid import LevelGrid, Levels, Spacing, own_levels, spaced_sigmas

# Exact to rounding for the weight e^(u - h) with h up to 40, beyond every schedule.
_POINTS, _LENGTHS = np.polynomial.legendre.leggauss(32)


@dataclass(frozen=True)
class _Multistep(Sampler):
    """A sampler on its own grid over the range of the levels, or on some of the network's own levels."""

    num_steps: int = 18  # grid points, the last of which is the smallest level
    num_levels: int | None = None  # instead: how many of the network's own levels to visit
    spacing: Spacing = "karras"
    rho: float = 7.0  # exponent of the karras grid
    denoise: bool = True

    smallest_length = 2
    descends = True

    @property
    def length(self) -> str:
        """See `Sampler`."""
        return "num_steps" if self.num_levels is None else "num_levels"

    def _levels(self, sigmas: Tensor) -> Levels:
        if self.num_levels is None:
            return spaced_sigmas(sigmas, self.num_steps, spacing=self.spacing, rho=self.rho), None
        return own_levels(sigmas, self.num_levels, spacing=self.spacing, rho=self.rho)

    def _points(self, num_levels: int) -> int:
        """Grid points; an upper bound with `karras` spacing of the network's own levels."""
        return self.num_steps if self.num_levels is None else min(self.num_levels, num_levels)


@dataclass(frozen=True)
class DpmSolver(_Multistep):
    """DPM-Solver++(2M) of Lu et al. 2022 and its SDE form; order 1 is DDIM, and with eta = 1 the ancestral sampler."""

    order: Literal[1, 2] = 2
    eta: float = 0.0  # 0 is the deterministic ODE, 1 the reverse SDE

    kind = "dpm_solver"

    def num_evaluations(self, num_levels: int) -> int:
        """See `Sampler`."""
        return self._points(num_levels) - (not self.denoise)

    def _run(self, grid: LevelGrid, x: Tensor, *, noise: NoiseSource, on_level: OnLevel) -> Tensor:
        older: list[tuple[float, Tensor]] = []  # the last denoised image, and its place from the current point
        for k, (sigma, lower) in enumerate(pairwise(grid.sigmas)):
            on_level(k, x)
            h = math.log(sigma / lower)
            values = [(0.0, grid.denoised(x, k)), *older]
            total = -math.expm1(-(1 + self.eta) * h)
            weights = midpoint_weights(h, _places(values), total)
            x = _weighted(x, lower / sigma * math.exp(-self.eta * h), values, weights)
            if self.eta > 0:
                x.add_(noise(k), alpha=lower * math.sqrt(-math.expm1(-2 * self.eta * h)))
            older = [(-h, values[0][1])] if self.order == 2 and grid.continues(k) else []
        on_level(len(grid.sigmas) - 1, x)
        return grid.denoised(x, -1) if self.denoise else x


@dataclass(frozen=True)
class UniPC(_Multistep):
    """UniPC of Zhao et al. 2023: a predictor through `order` values, and a corrector through the next one too.

    The evaluation at the predicted point serves the corrector and the next step. With `denoise` the result is the
    evaluation at the last predicted point, so `denoise` does not change the NFE.
    """

    num_steps: int = 12
    order: Literal[2, 3] = 3

    kind = "unipc"

    def num_evaluations(self, num_levels: int) -> int:
        """See `Sampler`."""
        return self._points(num_levels)

    def _run(self, grid: LevelGrid, x: Tensor, *, noise: NoiseSource, on_level: OnLevel) -> Tensor:  # noqa: ARG002
        values = [(0.0, grid.denoised(x, 0))]  # newest first, with their places from the current point
        on_level(0, x)
        for k, (sigma, lower) in enumerate(pairwise(grid.sigmas)):
            h = math.log(sigma / lower)
            predicted = _weighted(x, lower / sigma, values, step_weights(h, _places(values)))
            ahead = (h, grid.denoised(predicted, k + 1))
            if grid.continues(k):
                values = [ahead, *values]
                x = _weighted(x, lower / sigma, values, step_weights(h, _places(values)))
            else:
                x, values = predicted, [ahead]
            values = [(place - h, value) for place, value in values[: self.order]]
            on_level(k + 1, x)
        return values[0][1] if self.denoise else x


def midpoint_weights(h: float, nodes: Sequence[float], total: float) -> list[float]:
    """Weights, of sum `total`, of a polynomial's values at `nodes`: its value in the middle of the step times `total`.

    For two nodes the papers replace phi_1 by h phi_0 / 2, which is this.
    """
    return [total * float(weight) for weight in _lagrange(np.array(h / 2), nodes)]


def step_weights(h: float, nodes: Sequence[float]) -> list[float]:
    """Weights w_j of the D at u = nodes_j: the integral over u from 0 to h of e^(u - h) D(u) for a polynomial D.

    Exact, so sum_j w_j nodes_j^k = phi_k for k < len(nodes), except that two nodes get `midpoint_weights`.
    """
    if len(nodes) <= 2:
        return midpoint_weights(h, nodes, -math.expm1(-h))
    u = h / 2 * (1 + _POINTS)
    kernel = h / 2 * _LENGTHS * np.exp(u - h)
    return [float(np.sum(kernel * values)) for values in _lagrange(u, nodes)]


def _lagrange(u: NDArray[np.float64], nodes: Sequence[float]) -> Iterator[NDArray[np.float64]]:
    """The polynomials that are 1 at one of the nodes and 0 at the others, at u."""
    for j, node in enumerate(nodes):
        others = [other for m, other in enumerate(nodes) if m != j]
        yield math.prod(((u - other) / (node - other) for other in others), start=np.ones_like(u))


def _places(values: Sequence[tuple[float, Tensor]]) -> list[float]:
    return [place for place, _ in values]


def _weighted(x: Tensor, factor: float, values: Sequence[tuple[float, Tensor]], weights: Sequence[float]) -> Tensor:
    """The sum of factor * x and the weighted values, a new tensor."""
    x = x * factor
    for (_, value), weight in zip(values, weights, strict=True):
        x.add_(value, alpha=weight)
    return x
