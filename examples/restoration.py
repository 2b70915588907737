"""Images given a measurement y = A x + sigma_y n: any sampler, with a score that the measurement guides.

To the score of x at sigma is added J^T v with J = dD/dx, the derivative of the denoised image, by one
vector-Jacobian product through the network, and v = A^T (sigma_y^2 I + r^2 A A^T)^-1 (y - A D): the gradient of the log
density of y where an image given x has variance r^2 around D (pseudo-inverse guidance, Song et al. 2023). r = 0 is
stiff and diverges. With one r for all pixels, taken for independent, the result is biased: on a correlated Gaussian its
mean is off by 0.4 to 0.5 standard deviations of the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ncsn.core.losses import ScoreFunction
from ncsn.core.samplers.chain import sample
from ncsn.core.samplers.langevin import Fields, NoiseSource, field_of
from ncsn.core.samplers.settings import AnySampler
from ncsn.errors import InvalidValue

_WIDEST = 4.0  # where the kernel of a blur ends, in standard deviations


@dataclass(frozen=True)
class KnownPixels:
    """The pixels where the mask is true; a measurement has 0 at the others."""

    mask: Tensor  # bool, broadcast to [B, C, H, W]

    @property
    def blind(self) -> bool:
        """Whether nothing is measured."""
        return not bool(self.mask.any())

    def to(self, device: torch.device) -> KnownPixels:
        """The same for images there."""
        return KnownPixels(self.mask.to(device))

    def apply(self, x: Tensor) -> Tensor:
        """A x of images [B, C, H, W]."""
        return torch.where(self.mask, x, 0.0)

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y."""
        return torch.where(self.mask, y, 0.0)

    def explain(self, residual: Tensor, *, noise: float, spread: float) -> Tensor:
        """A^T (noise I + spread A A^T)^-1 residual, both variances; for images of variance `spread` their change.

        Where A A^T = I, as here, it is A^T residual / (noise + spread).
        """
        return self.adjoint(residual) / (noise + spread)


class Separable:
    """A x = R x C^T for each channel of images, by matrices R [h, H] over rows and C [w, W] over columns."""

    blind = False

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        self._rows, self._columns = rows, columns
        self._svds = [torch.linalg.svd(matrix.double(), full_matrices=False) for matrix in (rows, columns)]

    def to(self, device: torch.device) -> Separable:
        """The same for images there."""
        return Separable(self._rows.to(device), self._columns.to(device))

    def apply(self, x: Tensor) -> Tensor:
        return self._rows.to(x) @ x @ self._columns.to(x).T

    def adjoint(self, y: Tensor) -> Tensor:
        return self._rows.to(y).T @ y @ self._columns.to(y)

    def explain(self, residual: Tensor, *, noise: float, spread: float) -> Tensor:
        (u, s, v), (u_columns, s_columns, v_columns) = self._svds
        gains = s[:, None] * s_columns
        factors = (gains / (noise + spread * gains.square())).to(residual)
        inner = (u.to(residual).T @ residual @ u_columns.to(residual)) * factors
        change: Tensor = v.to(residual).T @ inner @ v_columns.to(residual)
        return change


Operator = KnownPixels | Separable


def means(height: int, width: int, *, factor: int) -> Separable:
    """The means over squares of `factor` x `factor` pixels; `factor` divides both sides of the images."""
    if height % factor or width % factor:
        raise InvalidValue(f"the factor must divide {height} and {width}, got {factor}")
    rows, columns = (torch.eye(side // factor).repeat_interleave(factor, dim=1) / factor for side in (height, width))
    return Separable(rows, columns)


def blur(height: int, width: int, *, deviation: float) -> Separable:
    """Blur by a normal kernel of this standard deviation in pixels, mirrored at the edges."""
    if not deviation > 0:
        raise InvalidValue(f"the deviation of a blur must be positive, got {deviation}")
    offsets = torch.arange(-(radius := int(_WIDEST * deviation + 0.5)), radius + 1)
    kernel = torch.exp(-0.5 * (offsets.double() / deviation).square())
    matrices = []
    for side in (height, width):
        places = (torch.arange(side)[:, None] + offsets) % (2 * side)
        places = torch.where(places < side, places, 2 * side - 1 - places)
        matrix = torch.zeros(side, side, dtype=torch.float64)
        matrices.append(matrix.scatter_add_(1, places, (kernel / kernel.sum()).expand(side, -1)))
    return Separable(*matrices)


def peak_signal_to_noise(x: Tensor, truth: Tensor) -> float:
    """PSNR in dB of values in [0, 1], over all of them; infinite for equal ones."""
    error = float((x.double() - truth.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


_FARTHEST = 20.0  # from zero, in standard deviations of data plus noise; a diverging chain soon goes beyond


class Diverged(InvalidValue):
    """The guidance drove an image away from all data."""


@dataclass(frozen=True)
class Observation:
    """What is known of the images that are sought."""

    operator: Operator
    y: Tensor  # 0 at pixels that are not known
    noise: float = 0.0  # sigma_y


Variance = Callable[[float], float]


def gaussian_variance(sigma_data: float) -> Variance:
    """r^2 at sigma for normal data of deviation `sigma_data`: their variance given data plus noise of sigma."""
    return lambda sigma: (sigma * sigma_data) ** 2 / (sigma**2 + sigma_data**2)


class Conditioned:
    """Score functions that a measurement of a batch guides, as samplers take them.

    `variance` is r^2 at sigma, `sigmas` are the network's levels [L]; by `scale`, the root mean square of the data,
    divergence is noticed.
    """

    def __init__(
        self,
        network: ScoreFunction | Fields,
        measured: Observation,
        variance: Variance,
        *,
        sigmas: Tensor,
        scale: float,
    ) -> None:
        self._network, self._measured, self._variance = network, measured, variance
        self._sigmas, self._scale, self._fields = sigmas, scale, dict[int, Conditioned]()

    def field_at(self, sigma: float) -> Conditioned:
        """The score function that holds at sigma, see `field_of`."""
        field = field_of(self._network, sigma)
        if field is self._network:
            return self
        if id(field) not in self._fields:
            self._fields[id(field)] = Conditioned(
                field, self._measured, self._variance, sigmas=self._sigmas, scale=self._scale
            )
        return self._fields[id(field)]

    def __call__(self, x: Tensor, level: Tensor | None = None, *, sigma: Tensor | None = None) -> Tensor:
        """Score of a batch that is at one level, or at one sigma."""
        at = float((self._sigmas[level[:1]] if level is not None else sigma[:1]).to(x.dtype))
        require_bounded(x, sigma=at, scale=self._scale)
        measured, spread = self._measured, self._variance(at)
        if not spread + measured.noise > 0:
            raise Diverged("r^2 and sigma_y are both 0")
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            field, noise = field_of(self._network, at), {"level": level} if sigma is None else {"sigma": sigma}
            score = field(x, **noise).to(x.dtype)
            denoised = torch.add(x, score, alpha=at**2)
            residual = measured.y - measured.operator.apply(denoised.detach())
            pull = measured.operator.explain(residual, noise=measured.noise**2, spread=spread)
            (change,) = torch.autograd.grad(denoised, x, pull)
        return score.detach() + change


def require_bounded(x: Tensor, *, sigma: float, scale: float) -> None:
    """Raise `Diverged` if the state of a sampler at sigma is farther out than data plus noise can be."""
    if not bool((x.abs() <= _FARTHEST * (scale + sigma)).all()):
        raise Diverged(f"at sigma = {sigma:.3g} the guided images are farther out than any image with noise")


@torch.no_grad()
def restored(
    network: ScoreFunction | Fields,
    measured: Observation,
    variance: Variance,
    *,
    sampler: AnySampler,
    x: Tensor,
    sigmas: Tensor,
    noise: NoiseSource,
    scale: float,
) -> Tensor:
    """Images that a sampler draws given a measurement; pixels that are known without noise come back exactly.

    A measurement of nothing gives what the sampler gives alone, bit by bit.

    Args:
        variance: r^2 at sigma, see `gaussian_variance`.
        sampler: On a grid from the largest to the smallest sigma.
        x: Start [B, C, H, W].
        sigmas: The network's levels [L], descending.
        scale: Root mean square of the data, by which divergence is noticed.

    Raises:
        Diverged: The images left the region of the data.
    """
    operator = measured.operator.to(x.device)
    if operator.blind:
        return sample(sampler, network, x=x, sigmas=sigmas, noise=noise)
    guided = Conditioned(network, replace(measured, operator=operator), variance, sigmas=sigmas, scale=scale)
    x = sample(sampler, guided, x=x, sigmas=sigmas, noise=noise)
    require_bounded(x, sigma=0.0, scale=scale)
    if isinstance(operator, KnownPixels) and measured.noise == 0:
        return torch.where(operator.mask, measured.y, x)
    return x
