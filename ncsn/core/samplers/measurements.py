"""Linear measurements y = A x + sigma_y n of images: some pixels, means over squares, and blurred images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ncsn.errors import InvalidValue

_WIDEST = 4.0  # where the kernel of a blur ends, in standard deviations


class Operator(Protocol):
    """A, with images [B, C, H, W]."""

    @property
    def blind(self) -> bool:
        """Whether nothing is measured."""

    def apply(self, x: Tensor) -> Tensor:
        """A x."""

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y."""

    def explain(self, residual: Tensor, *, noise: float, spread: float) -> Tensor:
        """A^T (noise I + spread A A^T)^-1 residual, both variances; for images of variance `spread` their change.

        Where A A^T = I, it is A^T residual / (noise + spread).
        """


@dataclass(frozen=True)
class KnownPixels:
    """The pixels where the mask is true; a measurement has 0 at the others."""

    mask: Tensor  # bool, broadcast to [B, C, H, W]

    @property
    def blind(self) -> bool:
        return not bool(self.mask.any())

    def apply(self, x: Tensor) -> Tensor:
        return torch.where(self.mask.to(x.device), x, 0.0)

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.where(self.mask.to(y.device), y, 0.0)

    def explain(self, residual: Tensor, *, noise: float, spread: float) -> Tensor:
        return self.adjoint(residual) / (noise + spread)


class Separable:
    """A x = M x M^T for each channel of square images, by a matrix M [h, H]."""

    blind = False

    def __init__(self, matrix: Tensor) -> None:
        self._matrix, self._svd = matrix, torch.linalg.svd(matrix.double(), full_matrices=False)

    def apply(self, x: Tensor) -> Tensor:
        return self._matrix.to(x) @ x @ self._matrix.to(x).T

    def adjoint(self, y: Tensor) -> Tensor:
        return self._matrix.to(y).T @ y @ self._matrix.to(y)

    def explain(self, residual: Tensor, *, noise: float, spread: float) -> Tensor:
        u, s, v = self._svd
        gains = s[:, None] * s
        factors = (gains / (noise + spread * gains.square())).to(residual)
        u, v = u.to(residual), v.to(residual)
        change: Tensor = v.T @ ((u.T @ residual @ u) * factors) @ v
        return change


def means(size: int, factor: int) -> Separable:
    """The means over squares of `factor` x `factor` pixels of square images; `factor` divides `size`."""
    if size % factor:
        raise InvalidValue(f"the factor must divide {size}, got {factor}")
    return Separable(torch.eye(size // factor).repeat_interleave(factor, dim=1) / factor)


def blur(size: int, width: float) -> Separable:
    """Blur of square images by a normal kernel of standard deviation `width` in pixels, mirrored at the edges."""
    if not width > 0:
        raise InvalidValue(f"the width of a blur must be positive, got {width}")
    offsets = torch.arange(-(radius := int(_WIDEST * width + 0.5)), radius + 1)
    kernel = torch.exp(-0.5 * (offsets.double() / width).square())
    places = (torch.arange(size)[:, None] + offsets) % (2 * size)
    places = torch.where(places < size, places, 2 * size - 1 - places)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.scatter_add_(1, places, (kernel / kernel.sum()).expand(size, -1))
    return Separable(matrix)


def peak_signal_to_noise(x: Tensor, truth: Tensor) -> float:
    """PSNR in dB of values in [0, 1], over all of them; infinite for equal ones."""
    error = float((x.double() - truth.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)
