"""The log-likelihood of images by the probability-flow ODE, and bits per dimension (Song et al. 2021, section 4.3).

With pixels in [-1, 1], primed, the ODE is solved for y = c_in(sigma') x' as a function of ln sigma', where its velocity
is the network F of Karras et al. 2022 itself:

    dy / d ln sigma' = -g F(y, sigma'),    g = sigma' sd' / (sigma'^2 + sd'^2)
    ln p(x') = D ln c_in(lowest) + ln N(y(highest); 0, I) - integral of g tr(dF / dy) d ln sigma'

For normal data of standard deviation sd' the velocity is 0, so any solver is exact; for others it is small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ncsn.core.keyed_random import Stream, keyed_uniform

HIGHEST_SIGMA = 40.0  # in [0, 1]; the normal prior there errs by less than 1e-9 bits per dimension
ScoreAt = Callable[[Tensor, Tensor], Tensor]  # images [B, C, H, W] with pixels in [0, 1] and sigma [B] to scores


@dataclass(frozen=True)
class LikelihoodOde:
    """The ODE of one kind of data and its solution by fourth-order Runge-Kutta steps, even in ln sigma."""

    sigma_data: float  # standard deviation of pixels in [0, 1] around mid-gray
    sigma_min: float  # of the density: that of the data plus noise of this standard deviation, in [0, 1]
    steps: int

    def log_density(self, score: ScoreAt, x: Tensor, *, probes: Tensor) -> Tensor:
        """Natural logarithm of the density of images [B, C, H, W] with pixels in [0, 1], float64 [B].

        The trace is the mean of v^T (dF / dy) v over the probes v [P, B, C, H, W], whose mean of v v^T is I.
        """
        size = x[0].numel()
        low, high = 2 * self.sigma_min, 2 * HIGHEST_SIGMA
        width, start = math.log(high / low) / self.steps, math.log(low)
        y, inner = (2 * x - 1) * self._scale(low), torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for k in range(self.steps):
            at = start + k * width
            slopes: list[Tensor] = []
            rates: list[Tensor] = []
            for ahead in (0.0, 0.5, 0.5, 1.0):
                point = y if not slopes else torch.add(y, slopes[-1], alpha=ahead * width)
                slope, rate = self._derivatives(score, point, math.exp(at + ahead * width), probes)
                slopes.append(slope)
                rates.append(rate)
            y = y + (width / 6) * (slopes[0] + 2 * (slopes[1] + slopes[2]) + slopes[3])
            inner = inner + (width / 6) * (rates[0] + 2 * (rates[1] + rates[2]) + rates[3])
        prior = -0.5 * (y.double().square().flatten(1).sum(1) + size * math.log(2 * math.pi))
        return prior + inner + size * (math.log(self._scale(low)) + math.log(2))

    def _scale(self, sigma: float) -> float:
        """c_in."""
        return float((sigma**2 + (2 * self.sigma_data) ** 2) ** -0.5)

    def _derivatives(self, score: ScoreAt, y: Tensor, sigma: float, probes: Tensor) -> tuple[Tensor, Tensor]:
        """Dy / d ln sigma' and the derivative of the logarithm of the density [B]."""
        scale, sd = self._scale(sigma), 2 * self.sigma_data
        gain = sigma * sd * scale**2
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            x = y / scale
            s = score((x + 1) / 2, torch.full((len(y),), sigma / 2, dtype=y.dtype, device=y.device)) / 2
            raw = (s + x * scale**2) * (sigma / (sd * scale))
            trace = torch.zeros(len(y), dtype=torch.float64, device=y.device)
            for v in probes:
                (product,) = torch.autograd.grad(raw, y, v, retain_graph=True)
                trace += (product * v).double().flatten(1).sum(1) / len(probes)
        return -gain * raw.detach(), -gain * trace


def hutchinson_probes(seed: int, *, first: int, count: int, number: int, shape: tuple[int, ...]) -> Tensor:
    """Vectors of independent signs for images `first .. first + count`, float32 [number, count, *shape]."""
    u = keyed_uniform(seed, stream=Stream.HUTCHINSON, first=first, count=count, size=number * math.prod(shape))
    signs = torch.where(u < 0.5, -1.0, 1.0)
    return signs.view(count, number, *shape).transpose(0, 1).contiguous()
