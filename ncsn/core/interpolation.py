"""Interpolation between two samples by mixing their noise (Song & Ermon 2020)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ncsn.core.langevin import NoiseSource


class InterpolatedNoise:
    """Noise of a batch of images on the way from one to another: cos(phi) z_p + sin(phi) z_q, phi in [0, pi / 2].

    Every mixture is standard normal, so a sampler runs with it as with any noise, and its batch begins with the image
    of the first source and ends with that of the second. All images of the batch must share one start.

    Args:
        first: Noise source z_p of one image, [1, C, H, W] per draw.
        second: Noise source z_q of the other.
        count: Number of images, both ends included, at least 2.
    """

    def __init__(self, first: NoiseSource, second: NoiseSource, *, count: int) -> None:
        if count < 2:
            raise ValueError(f"an interpolation has at least its two ends, got count = {count}")
        self.first, self.second = first, second
        fractions = [k / (count - 1) for k in range(count)]
        # The last cosine is set, because cos(pi / 2) is not 0 in floating point and the end must be the image itself.
        self._cosines = [math.cos(f * math.pi / 2) for f in fractions[:-1]] + [0.0]
        self._sines = [math.sin(f * math.pi / 2) for f in fractions]

    def __call__(self, step: int) -> Tensor:
        """Draw number `step`, [count, C, H, W]."""
        z_p, z_q = self.first(step), self.second(step)
        if z_p.shape[0] != 1 or z_p.shape != z_q.shape:
            raise ValueError(
                f"both sources must draw for one image, got shapes {list(z_p.shape)} and {list(z_q.shape)}"
            )
        return torch.cat([c * z_p + s * z_q for c, s in zip(self._cosines, self._sines, strict=True)])
