"""Interpolation between two samples by mixing their noise (Song & Ermon 2020)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ncsn.core.keyed_random import KeyedNoise


class InterpolatedNoise:
    """Noise of a batch of images on the way from one to another: cos(phi) z_p + sin(phi) z_q, phi in [0, pi / 2].

    Every mixture is standard normal, so a sampler runs with it as with any noise, and its batch begins with the image
    of the first source and ends with that of the second. Chains with noise in every step share one start, as in the
    paper; a start that is a normal draw itself is mixed like the others.

    Args:
        first: Noise z_p of one image.
        second: Noise z_q of the other.
        count: Number of images, both ends included, at least 2.
    """

    def __init__(self, first: KeyedNoise, second: KeyedNoise, *, count: int) -> None:
        if count < 2:
            raise ValueError(f"an interpolation has at least its two ends, got count = {count}")
        if (first.count, first.shape) != (1, second.shape) or second.count != 1:
            raise ValueError(
                "both sources must draw for one image, got shapes "
                f"{[first.count, *first.shape]} and {[second.count, *second.shape]}"
            )
        self.first, self.second = first, second
        fractions = [k / (count - 1) for k in range(count)]
        # The last cosine is set, because cos(pi / 2) is not 0 in floating point and the end must be the image itself.
        self._cosines = [math.cos(f * math.pi / 2) for f in fractions[:-1]] + [0.0]
        self._sines = [math.sin(f * math.pi / 2) for f in fractions]

    def __call__(self, step: int) -> Tensor:
        """Normal draw number `step`, [count, C, H, W]."""
        z_p, z_q = self.first(step), self.second(step)
        return torch.cat([c * z_p + s * z_q for c, s in zip(self._cosines, self._sines, strict=True)])

    def uniform(self, step: int) -> Tensor:
        """Uniform draw number `step` of the first image for all, [count, C, H, W]: a mixture would not be uniform."""
        shared = self.first.uniform(step)
        return shared.expand(len(self._cosines), *shared.shape[1:])
