"""Dropout whose masks belong to the images.

PyTorch's dropout draws from a generator in the order of the batch, so its masks change with the number of workers that
share a batch. Here a mask is a function of the image's noisy pixels, which no two images of a training share, and of
the layer: the same in whatever batch, on whatever worker, and when a step is repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Odd constants of 32 bits as the int32 that stands for them; products wrap around.
_GOLDEN, _FIRST, _SECOND = (number - 2**32 for number in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35))


def image_keys(x: Tensor) -> Tensor:
    """One number per image of `x` [B, ...], int32 [B]; another if a single bit of a pixel is another."""
    bits = x.detach().float().flatten(1).view(torch.int32)
    # A sum of integers is the same in any order, so on any device.
    return _mix(_mix(bits + _places(bits.shape[1], x.device)).sum(dim=1, dtype=torch.int32))


class KeyedDropout(nn.Module):
    """Zeroes activations with probability `p`, to 1/65536, and scales the others by 1 / (1 - p).

    Args:
        p: The probability, in [0, 1).

    Attributes:
        layer: Number of the layer, for its network to set; another layer draws other masks.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.layer = p, 0

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """Activations [B, C, H, W] to the same shape; unchanged without the keys [B] of their images."""
        if keys is None:
            return x
        count = x[0].numel()
        first = _mix(keys + _places(self.layer + 1, x.device)[-1])
        # 16 bits for each activation, so two of them from each number.
        bits = _mix(first[:, None] + _places((count + 1) // 2, x.device)).view(torch.int16)[:, :count]
        kept = (bits >= round(self.p * 2**16) - 2**15).view(x.shape)
        y: Tensor = x * (kept.to(x.dtype) / (1 - self.p))
        return y


def _places(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device) * _GOLDEN


def _mix(h: Tensor) -> Tensor:
    """Scatter int32 numbers, given up to this function: the finaliser of MurmurHash3, whose shifts fill with zeros."""
    h = h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF)).mul_(_FIRST)
    h = h.bitwise_xor_((h >> 13).bitwise_and_(0x7FFFF)).mul_(_SECOND)
    return h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF))
