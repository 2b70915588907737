"""The owner of pixel ranges: uint8 NHWC outside, float32 NCHW in [0, 1] or its logits where a network sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LOGIT_MARGIN = 1e-6


def to_unit(images_u8: Tensor) -> Tensor:
    """Bring stored images to network space.

    Args:
        images_u8: uint8 [B, H, W, C].

    Returns:
        float32 [B, C, H, W] in [0, 1], contiguous.
    """
    if images_u8.dtype != torch.uint8 or images_u8.ndim != 4:
        raise ValueError(
            f"expected uint8 images [B, H, W, C], got {images_u8.dtype} of shape {list(images_u8.shape)}; "
            "convert before calling to_unit"
        )
    return images_u8.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def dequantize(x: Tensor, u: Tensor) -> Tensor:
    """Spread each gray step evenly: (255 x + u) / 256.

    Args:
        x: Images in [0, 1] on the grid of 256 gray steps, as `to_unit` gives them.
        u: Uniform (0, 1) numbers of the same shape, fresh at each use.

    Returns:
        Same shape, in [0, 1); floor(256 result) is the gray value for every input.
    """
    # 8 bits of gray and 16 of noise fill float32's 24 exactly, so no sum rounds up into the next gray step or to 1.
    return (255 * x).round_().add_((u * 65536).floor_(), alpha=1 / 65536).div_(256)


def to_uint8(x: Tensor) -> Tensor:
    """Bring samples back to stored images: clamp to [0, 1], then round half up.

    Args:
        x: Float [B, C, H, W].

    Returns:
        uint8 [B, H, W, C] on the same device.

    Raises:
        ValueError: A value is NaN or infinite, which would otherwise become a plausible gray.
    """
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {x.numel()} pixel values are NaN or infinite: the sampler diverged, lower its epsilon"
        )
    gray = x.float().clamp(0, 1).mul_(255).add_(0.5).floor_().to(torch.uint8)
    return gray.permute(0, 2, 3, 1).contiguous()


def mirror(x: Tensor, mask: Tensor) -> Tensor:
    """Flip the images [B, C, H, W] where `mask` (bool [B]) is true left to right."""
    return torch.where(mask.view(-1, 1, 1, 1), x.flip(-1), x)


def logit(x: Tensor) -> Tensor:
    """Map [0, 1] to the real line: log y - log(1 - y) with y = margin + (1 - 2 margin) x, finite at 0 and 1."""
    y = LOGIT_MARGIN + (1 - 2 * LOGIT_MARGIN) * x
    return y.log() - torch.log1p(-y)


def unlogit(y: Tensor) -> Tensor:
    """Invert `logit` up to its margin: the sigmoid, in (0, 1)."""
    return torch.sigmoid(y)


@dataclass(frozen=True)
class PixelSpace:
    """The space in which a network is trained and a sampler moves.

    Attributes:
        dequantized: Whether gray steps are spread evenly, see `dequantize`.
        logit: Whether it is the real line, see `logit`; else [0, 1].
    """

    dequantized: bool = False
    logit: bool = False

    def encode(self, images_u8: Tensor, u: Tensor | None = None) -> Tensor:
        """Bring stored images to the space.

        Args:
            images_u8: uint8 [B, H, W, C].
            u: Uniform (0, 1) numbers [B, C, H, W] for the dequantisation; None takes the middle of each gray step.

        Returns:
            float32 [B, C, H, W].
        """
        x = to_unit(images_u8)
        if self.dequantized:
            x = dequantize(x, torch.full_like(x, 0.5) if u is None else u)
        return self.transform(x)

    def transform(self, x: Tensor) -> Tensor:
        """Bring values in [0, 1] to the space."""
        return logit(x) if self.logit else x

    def invert(self, y: Tensor) -> Tensor:
        """Undo `transform`."""
        return unlogit(y) if self.logit else y


def image_grid(images_u8: np.ndarray | Tensor, *, columns: int, padding: int = 1) -> np.ndarray:
    """Tile images row by row on black, with `padding` pixels around and between them.

    Args:
        images_u8: uint8 [N, H, W, C], N >= 1.
        columns: Images per row.
        padding: Width of the gaps in pixels.

    Returns:
        uint8 [H', W', C].
    """
    images = images_u8.cpu().numpy() if isinstance(images_u8, Tensor) else np.asarray(images_u8)
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"expected uint8 images [N, H, W, C], N >= 1, got {images.dtype} of shape {list(images.shape)}"
        )
    if columns < 1 or padding < 0:
        raise ValueError(f"expected columns >= 1 and padding >= 0, got columns = {columns} and padding = {padding}")
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
