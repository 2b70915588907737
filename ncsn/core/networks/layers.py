"""Layers: a convolution with a term per image, group normalization by image, and keyed dropout.

They are written out where a compiler for a GPU joins their parts with those of their neighbors.

PyTorch's dropout draws from a generator in the order of the batch, so its masks change with the number of workers that
share a batch. Here a mask is a function of the image's noisy pixels, which no two images of a training share, and of
the layer: the same in any batch, on any worker, and when a step is repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

EPS = 1e-5
# Of one call of group norm with a backward pass, for which CUDA starts a block each: the limit of a grid dimension.
_MOST_GROUPS = 65_535

# Options of torch.compile for a GPU: its kernels compute a map again where they read it. By default one that is read
# more than once goes to memory, in float32, if it takes more than four reads or 30 operations.
FUSION: dict[str, str | int | bool] = {
    "realize_reads_threshold": 16,
    "realize_acc_reads_threshold": 32,
    "realize_opcount_threshold": 100,
}


def narrowed(network: nn.Module) -> dict[str, nn.Module]:
    """Layers by name, of which autocast would cast the parameters in each pass: convolutions and linear layers.

    What a network computes in float32 under autocast too, its `full_precision`, is none of them.
    """
    exact: tuple[str, ...] = getattr(network, "full_precision", ())
    kinds = nn.Conv2d | nn.Linear
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, kinds) and not name.startswith(exact)
    }


def fuses(x: Tensor) -> bool:
    """Whether a compiler for a GPU joins operations on `x` into kernels, so that each costs no pass over it."""
    return x.is_cuda and torch.compiler.is_compiling()


class Conv2d(nn.Conv2d):
    """A convolution that can add a term per image and channel to its shift."""

    def forward(self, x: Tensor, term: Tensor | None = None) -> Tensor:
        """[B, C, H, W] and a term [B, C'] or none to [B, C', H', W']."""
        if self.bias is None or not fuses(x):
            y: Tensor = super().forward(x)
            return y if term is None else y + term.to(y.dtype)[:, :, None, None]
        y = self._conv_forward(x, self.weight, None)
        # The gradient of a shift per image is a sum over its pixels, by the kernel that has the maps at hand. Over the
        # whole batch it takes two more.
        shift = self.bias.float().expand(len(x), -1)
        shift = shift if term is None else shift + term
        return (y + shift[:, :, None, None]).to(y.dtype)


def group_norm_by_image(x: Tensor, *, groups: int, scale: Tensor, shift: Tensor) -> Tensor:
    """Group norm of feature maps [B, C, H, W] with a scale and a shift [B, C] per image, in the type of x."""
    if fuses(x):
        return _group_norm(x, groups=groups, scale=scale, shift=shift, eps=EPS)
    # The images' channels, joined to one image of B * C channels, need one fused call instead of five passes over the
    # feature maps: a third of the time, in training a fifth.
    images = max(1, _MOST_GROUPS // groups)
    if len(x) > images and torch.is_grad_enabled():
        parts = zip(*(torch.split(each, images) for each in (x, scale, shift)), strict=True)
        return torch.cat([group_norm_by_image(a, groups=groups, scale=b, shift=c) for a, b, c in parts])
    batch, channels, height, width = x.shape
    laid_out = x.reshape(1, batch * channels, height, width)
    # Folding the mean into the shift costs a constant channel some digits in float32 (1e-4 at deviation zero), as in
    # PyTorch's instance norm. bfloat16, [32, 64, 28, 28], forward and backward: 4.7 ms instead of 37.
    y = functional.group_norm(laid_out, batch * groups, scale.flatten(), shift.flatten(), EPS)
    return y.view(x.shape).to(x.dtype)


def _group_norm(x: Tensor, *, groups: int, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Group norm with scale and shift [C] or [B, C], written out so that a compiler can join it with its neighbors.

    It can be differentiated once.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    maps = wide.reshape(len(x), groups, -1, *x.shape[2:])  # [B, groups, C / groups, H, W]
    scale, shift = (each.reshape(-1, *maps.shape[1:3], 1, 1) for each in (scale, shift))
    mean = maps.mean(dim=(2, 3, 4), keepdim=True)
    # The derivative of a variance by its mean is zero. So the backward pass needs two sums over the maps only:
    # those for gain and shift of each image and channel.
    variance = (maps - mean.detach()).square().mean(dim=(2, 3, 4), keepdim=True)
    gain = scale * torch.rsqrt(variance + eps)
    y = maps * gain + (shift - mean * gain)
    return y.reshape(x.shape).to(x.dtype)


class GroupNorm(nn.GroupNorm):
    """PyTorch's group norm in the type of its maps, also where autocast computes it in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape and type."""
        if fuses(x):
            return _group_norm(x, groups=self.num_groups, scale=self.weight, shift=self.bias, eps=self.eps)
        return super().forward(x).to(x.dtype)


# Odd constants of 32 bits as the int32 that stands for them; products wrap around.
_GOLDEN, _FIRST, _SECOND = (number - 2**32 for number in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35))


def image_keys(x: Tensor) -> Tensor:
    """One number per image of `x` [B, ...], int32 [B]; it changes with any bit of a pixel."""
    bits = x.detach().float().flatten(1).view(torch.int32)
    # A sum of integers is the same in any order, so on any device.
    return _mix(_mix(bits + _places(bits.shape[1], x.device)).sum(dim=1, dtype=torch.int32))


class KeyedDropout(nn.Module):
    """Zeroes activations with probability `p` in [0, 1), to 1/65536, and scales the others by 1 / (1 - p)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.layer = 0  # set by the network: each layer draws other masks

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """Drop activations [B, C, H, W] by the keys [B] of their images; without keys, none."""
        if keys is None:
            return x
        count = x[0].numel()
        first = _mix(keys + _places(self.layer + 1, x.device)[-1])
        # 16 bits for each activation, so two of them from each number, the lower ones first.
        if fuses(x):
            place = torch.arange(count, dtype=torch.int32, device=x.device)
            bits = _mix(first[:, None] + (place >> 1) * _GOLDEN) << (16 - 16 * (place & 1)) >> 16
        else:
            bits = _mix(first[:, None] + _places((count + 1) // 2, x.device)).view(torch.int16)[:, :count]
        kept = (bits >= round(self.p * 2**16) - 2**15).view(x.shape)
        y: Tensor = x * (kept.to(x.dtype) / (1 - self.p))
        return y


def _places(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device) * _GOLDEN


def _mix(h: Tensor) -> Tensor:
    """Scatter int32 numbers in place, by the finalizer of MurmurHash3, whose shifts fill with zeros."""
    h = h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF)).mul_(_FIRST)
    h = h.bitwise_xor_((h >> 13).bitwise_and_(0x7FFFF)).mul_(_SECOND)
    return h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF))
