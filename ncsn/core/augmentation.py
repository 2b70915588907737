"""Geometric augmentation of clean images, of which the network is told (Karras et al. 2020 and 2022).

What was done to an image is eight numbers a0, ..., a7, all zero for nothing. With points p of an image in [-1, 1]^2, u
to the right and v down, the image becomes out(p) = in(G^-1 p), where G applies in this order

1. the mirror image in u where a0 = 1; 2. that in v where a1 = 1;
3. scaling by 2^(0.2 a2);
4. rotation by -a3;
5. scaling by 2^(0.2 a5) along the direction of angle a4 and by 2^(-0.2 a5) across it;
6. translation by a6 / 8 of the width and a7 / 8 of the height.

A network that was told draws images without augmentation when it is told of none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ncsn.core.images import mirror
from ncsn.core.keyed_random import Stream, keyed_uniform

_SPREAD = 0.2  # standard deviation of the scalings, in powers of 2
_TRANSLATION = 2 / 8  # standard deviation, in units of u and v

# A low-pass filter for both enlarging and reducing by 2: a sinc in a Kaiser window. With these two constants the one
# undoes the other to a thousandth, for noise as well.
_TAPS, _CUTOFF, _KAISER_BETA = 12, 0.593, 8.5
_MARGIN = _TAPS // 2 - 1  # samples of the enlarged image outside it that reducing takes


def draw_transforms(seed: int, *, first: int, count: int, probability: float, y_flip: bool) -> Tensor:
    """The numbers a0, ..., a7 for the images at places `first .. first + count`, float32 [count, 8].

    Half of the images are mirrored. Each of 2 to 6 is applied with `probability`, in (0, 1], independently; 2 then
    mirrors half of the images, if `y_flip`. Scalings and translations are normal, angles uniform; half of the
    scalings of 5 are along u. Each row is a function of (seed, place) alone.
    """
    u = keyed_uniform(seed, stream=Stream.AUGMENTATION, first=first, count=count, size=10).double()
    applied = u[:, 2:6] < probability
    # Uniform where it is applied.
    rotation, direction = (u[:, column] / probability for column in (3, 4))
    normal = torch.special.ndtri(u[:, 6:])
    a = torch.zeros(count, 8, dtype=torch.float64)
    a[:, 0] = u[:, 0] < 0.5
    a[:, 1] = (u[:, 1] < probability / 2) & y_flip
    a[:, 2] = applied[:, 0] * normal[:, 0]
    a[:, 3] = applied[:, 1] * math.pi * (2 * rotation - 1)
    a[:, 4] = (applied[:, 2] & (direction > 0.5)) * math.pi * (4 * direction - 3)
    a[:, 5] = applied[:, 2] * normal[:, 1]
    a[:, 6:] = applied[:, 3:] * normal[:, 2:]
    return a.float()


def augmentation_labels(a: Tensor) -> Tensor:
    """What the network is told of [B, 8] numbers: [B, 9], zero where nothing was done."""
    return torch.stack(
        (
            *a[:, :3].unbind(1),
            a[:, 3].cos() - 1,
            a[:, 3].sin(),
            a[:, 5] * a[:, 4].cos(),
            a[:, 5] * a[:, 4].sin(),
            *a[:, 6:].unbind(1),
        ),
        dim=1,
    )


@dataclass(frozen=True)
class Transforms:
    """What is done to a batch of images, made on the CPU: there it takes no synchronization with a GPU."""

    flips: Tensor  # bool [2, B], in u and in v
    rows: Tensor  # int64 [M], the images with more than that
    maps: Tensor  # float32 [M, 2, 3] of these, see `inverse_maps`

    @classmethod
    def of(cls, a: Tensor, *, height: int, width: int) -> Transforms:
        """Those of numbers a [B, 8] for images of this size."""
        rows = a[:, 2:].any(dim=1).nonzero().flatten()
        return cls(a[:, :2].T.bool(), rows, inverse_maps(a[rows], aspect=width / height).float())

    def apply(self, x: Tensor) -> Tensor:
        """Augment images x [B, C, H, W], which are where these numbers are.

        Beyond their borders they are continued by reflection. Mirror images are exact; only what is more than that is
        resampled, once, and may leave the range of x.
        """
        flipped = mirror(x, self.flips[0])
        flipped = torch.where(self.flips[1].view(-1, 1, 1, 1), flipped.flip(-2), flipped)
        if len(self.rows) == 0:
            return flipped
        # By way of images of twice the size, which are sampled at the places that the maps give to each pixel.
        rows, columns = (_filters(size, x.device, x.dtype) for size in x.shape[2:])
        enlarged = rows[0] @ flipped[self.rows] @ columns[0].T
        warped = rows[1] @ sampled(enlarged, self.maps.to(x.dtype), margin=_MARGIN) @ columns[1].T
        return flipped.index_copy(0, self.rows, warped)


def inverse_maps(a: Tensor, *, aspect: float = 1.0) -> Tensor:
    """The inverse of steps 3 to 6 as matrices [B, 2, 3] that map (u, v, 1) to (u, v), for this width over height."""
    a = a.double()
    stretch = 2 ** (-_SPREAD * a[:, 5])
    along, back = _rotations(a[:, 4]), _rotations(-a[:, 4])
    unstretched = along @ torch.diag_embed(torch.stack((stretch, 1 / stretch), dim=1)) @ back
    linear = 2 ** (-_SPREAD * a[:, 2, None, None]) * _rotations(a[:, 3]) @ unstretched
    # Rotations are of pixels, of which u and v count different numbers in a rectangle.
    linear = linear * torch.tensor([[1, 1 / aspect], [aspect, 1]], dtype=torch.float64)
    shift = _TRANSLATION * a[:, 6:, None]
    return torch.cat((linear, -linear @ shift), dim=2)


def _rotations(angle: Tensor) -> Tensor:
    """Rotations [B, 2, 2] that turn u toward v by angles [B]."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.stack((cos, -sin), dim=1), torch.stack((sin, cos), dim=1)), dim=1)


def sampled(x: Tensor, maps: Tensor, *, margin: int = 0) -> Tensor:
    """Images [B, C, H, W] at mapped pixel centers, interpolated linearly; with `margin` more pixels on each side."""
    centers = [(2 * torch.arange(-margin, size + margin, device=x.device) + 1) / size - 1 for size in x.shape[2:]]
    v, u = torch.meshgrid(*(each.to(x) for each in centers), indexing="ij")
    by_u, by_v, shift = maps[:, None, None].unbind(-1)
    # Not a matrix product, whose rounding depends on the number of images on some CPUs. In float64 the sum is rounded
    # once, as by a fused multiply-add.
    linear = (u[..., None] * by_u).double() + v[..., None].double() * by_v.double()
    grid = linear.to(x.dtype) + shift
    return functional.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


@cache
def _filters(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Matrices [2 S, S] and [S, 2 S + 2 margin] that enlarge and reduce a row of S pixels."""
    places = np.arange(_TAPS) - (_TAPS - 1) / 2
    taps = np.sinc(_CUTOFF * places) * np.kaiser(_TAPS, _KAISER_BETA)
    # So that a constant stays one.
    taps[::2] /= taps[::2].sum()
    taps[1::2] /= taps[1::2].sum()
    enlarge, reduce = np.zeros((2 * size, size)), np.zeros((size, 2 * size + 2 * _MARGIN))
    for pixel in range(-_MARGIN, size + _MARGIN):
        row = min(max(pixel, -1 - pixel), 2 * size - 1 - pixel)  # reflected
        for tap, weight in enumerate(taps):
            sample = 2 * pixel + tap - _MARGIN
            if 0 <= sample < 2 * size:
                enlarge[sample, row] += weight
            if 0 <= pixel < size:
                reduce[pixel, sample + _MARGIN] += weight / 2
    return torch.from_numpy(enlarge).to(device, dtype), torch.from_numpy(reduce).to(device, dtype)
