"""The owner of pixel ranges: stored as NHWC between two limits, float32 NCHW in [0, 1] where a network sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ncsn.core.keyed_random import COMMON_SEED, Stream, keyed_normal
from ncsn.errors import InvalidValue

Limits = tuple[float, float]  # the stored values that are 0 and 1 to a network
BYTE: Limits = (0, 255)


def to_unit(images: Tensor, limits: Limits = BYTE, *, u: Tensor | None = None) -> Tensor:
    """Stored images [B, H, W, C] as contiguous float32 [B, C, H, W] in [0, 1].

    With u uniform in (0, 1), in the shape of the result, each gray step of uint8 or uint16 is spread evenly: the result
    is (value - low + u) / (high - low + 1), in [0, 1). Of uint8 it is (gray + u) / 256, and floor(256 result) the gray
    value for every input.
    """
    if images.dtype not in (torch.uint8, torch.uint16, torch.float32) or images.ndim != 4:
        raise ValueError(f"expected stored images [B, H, W, C], got {images.dtype} of shape {list(images.shape)}")
    low, high = limits
    values = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    values = values.sub_(low) if low else values
    if u is None:
        return values.div_(high - low)
    # Bits of the value and of the noise fill float32's 24 exactly, so no sum rounds up into the next gray step or to 1.
    steps = 65536 if images.dtype == torch.uint8 else 256
    return values.add_((u * steps).floor_(), alpha=1 / steps).div_(high - low + 1)


def to_stored(x: Tensor, *, dtype: str = "uint8", limits: Limits = BYTE, dequantized: bool = False) -> Tensor:
    """Samples [B, C, H, W] as stored images [B, H, W, C].

    They are clamped to [0, 1]. Whole numbers are rounded half up, which inverts `to_unit`. With `dequantized` they are
    what `to_unit` spreads, for uint8 floor(256 x).

    Raises:
        InvalidValue: A value is NaN or infinite, which would otherwise become a plausible gray.
    """
    if bad := int((~torch.isfinite(x)).sum()):
        raise InvalidValue(f"{bad:,} of {x.numel():,} pixel values are NaN or infinite: the sampler diverged")
    low, high = limits
    unit = x.float().clamp(0, 1)
    if dtype == "float32":
        values = unit.mul_(high - low)
    elif dequantized:
        values = unit.mul_(high - low + 1).clamp_(max=high - low).floor_()
    else:
        values = unit.mul_(high - low).add_(0.5).floor_()
    return values.add_(low).to(getattr(torch, dtype)).permute(0, 2, 3, 1).contiguous()


def eight_bit(images: np.ndarray, limits: Limits) -> np.ndarray:
    """Stored images as uint8, low as 0 and high as 255, for pictures and for the features of an evaluation."""
    if images.dtype == np.uint8:
        return images
    low, high = limits
    gray: np.ndarray = ((images.astype(np.float32) - low) * (255 / (high - low)) + 0.5).clip(0, 255).astype(np.uint8)
    return gray


def mirror(x: Tensor, mask: Tensor) -> Tensor:
    """Flip the images [B, C, H, W] where `mask` (bool [B]) is true left to right."""
    return torch.where(mask.view(-1, 1, 1, 1), x.flip(-1), x)


_FEW_PIXELS = 1024  # of which all components are found
_EXTRA_COMPONENTS, _ROUNDS = 32, 12


# Part of every checkpoint, so that samplers that remember their start need no dataset.
@dataclass(frozen=True)
class DataMoments:
    """Mean and covariance of the pixels of a dataset, the covariance as V diag(variances - rest) V^T + rest I."""

    mean: Tensor  # float32 [C, H, W]
    directions: Tensor  # V^T, orthonormal rows of the leading principal components, float32 [K, D], D = C H W
    variances: Tensor  # along each, descending, float32 [K]
    rest: float  # mean variance of the D - K other directions


def fit_moments(x: Tensor, *, num_components: int = 64) -> DataMoments:
    """Mean and leading principal components of images [N, C, H, W] in network space, N >= 2, on the CPU.

    The components are fewer if N - 1 or D is smaller; the total variance is that of the data for any number.
    """
    if len(x) < 2:
        raise InvalidValue(f"moments need at least 2 images, got {len(x)}")
    flat = x.detach().cpu().flatten(1).to(torch.float64)
    mean = flat.mean(dim=0)
    flat = flat - mean
    count = min(num_components, len(flat) - 1, flat.shape[1])
    basis = torch.eye(flat.shape[1], dtype=torch.float64)
    if flat.shape[1] > _FEW_PIXELS:
        # Subspace iteration: the basis turns to the leading components, faster where more of them are carried along.
        rows = min(count + _EXTRA_COMPONENTS, len(flat))
        draw = keyed_normal(COMMON_SEED, stream=Stream.SUBSPACE, first=0, count=rows, size=flat.shape[1])
        basis = draw.T.double()
        for _ in range(_ROUNDS):
            basis = torch.linalg.qr(flat.T @ (flat @ basis))[0]
    within = flat @ basis
    eigenvalues, vectors = torch.linalg.eigh(within.T @ within / (len(flat) - 1))
    variances, directions = eigenvalues.flip(0), (basis @ vectors).T.flip(0)
    total = float(flat.square().sum() / (len(flat) - 1))
    leading = variances[:count].clamp(min=0)
    rest = max(total - float(leading.sum()), 0.0) / max(flat.shape[1] - count, 1)
    return DataMoments(
        mean=mean.view(x.shape[1:]).float(),
        directions=directions[:count].float().contiguous(),
        variances=leading.float(),
        rest=rest,
    )


def moment_matched(moments: DataMoments, *, sigma: float, z: Tensor) -> Tensor:
    """A draw from N(mean, covariance + sigma^2 I), the normal distribution nearest to the data plus noise of sigma.

    It is close to that data even where sigma is far below the spread of the data. z: standard normal [B, C, H, W].
    """
    flat = z.flatten(1)
    directions = moments.directions.to(flat)
    rest = (moments.rest + sigma**2) ** 0.5
    gain = (moments.variances.to(flat) + sigma**2).sqrt() - rest
    spread = rest * flat + ((flat @ directions.T) * gain) @ directions
    start: Tensor = moments.mean.to(z) + spread.view_as(z)
    return start


def picture_channels(images: np.ndarray) -> np.ndarray:
    """What a picture shows of images [..., C]: the first three channels if there are as many, else the first."""
    return images[..., : 3 if images.shape[-1] >= 3 else 1]


def image_grid(images_u8: np.ndarray | Tensor, *, columns: int, padding: int = 1) -> np.ndarray:
    """Tile images uint8 [N, H, W, C], N >= 1, row by row on black, `padding` pixels apart, as uint8 [H', W', C'].

    C' is 1 or 3, see `picture_channels`.
    """
    images = picture_channels(images_u8.cpu().numpy() if isinstance(images_u8, Tensor) else np.asarray(images_u8))
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    cell_height, cell_width = height + padding, width + padding
    cells = np.zeros((rows * columns, cell_height, cell_width, channels), np.uint8)
    cells[:count, padding:, padding:] = images
    tiled = cells.reshape(rows, columns, cell_height, cell_width, channels).swapaxes(1, 2)
    grid = np.zeros((rows * cell_height + padding, columns * cell_width + padding, channels), np.uint8)
    grid[: rows * cell_height, : columns * cell_width] = tiled.reshape(rows * cell_height, -1, channels)
    return grid
