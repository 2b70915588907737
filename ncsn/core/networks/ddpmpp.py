"""The DDPM++ network of Song et al. 2021 as Karras et al. 2022 train it: 55.7 million parameters for CIFAR-10.

Residual sums are scaled by sqrt(1/2), the embedding of the noise is added between the convolutions of a block, and the
decoder takes the output of every block of the encoder. The maps `enc` and `dec` have the names of published run logs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ncsn.core.networks.base import ConditionTerms, PreconditionedNetwork, attend, num_groups
from ncsn.core.networks.layers import Conv2d, GroupNorm, KeyedDropout
from ncsn.errors import InvalidValue

_EPS = 1e-6  # of all group norms
_LOWEST_FREQUENCY = 1e-4
# Gains of the initial weights. Not exactly zero, so that each parameter has a gradient from the first step on.
_NEARLY_ZERO, _OF_ATTENTION = 1e-5, math.sqrt(0.2)

Resampling = Literal["down", "up"]


def _group_norm(width: int) -> GroupNorm:
    return GroupNorm(num_groups(width), width, eps=_EPS)


def _conv(in_width: int, out_width: int, *, size: int = 3, gain: float = 1.0) -> Conv2d:
    """A convolution with Xavier's uniform weights times `gain` and without shift."""
    conv = Conv2d(in_width, out_width, size, padding=size // 2)
    nn.init.xavier_uniform_(conv.weight, gain)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _linear(in_width: int, out_width: int) -> nn.Linear:
    linear = nn.Linear(in_width, out_width)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


# On a CPU PyTorch's kernels for both take two to four times as long as convolutions.
def halve(x: Tensor) -> Tensor:
    """Means of 2x2 pixels: [B, C, H, W] to [B, C, H / 2, W / 2]."""
    if x.device.type != "cpu":
        return functional.avg_pool2d(x, 2)
    return functional.conv2d(x, _squares(x) / 4, stride=2, groups=x.shape[1])


def double(x: Tensor) -> Tensor:
    """Each pixel as 2x2: [B, C, H, W] to [B, C, 2 H, 2 W]."""
    if x.device.type != "cpu":
        doubled: Tensor = functional.interpolate(x, scale_factor=2, mode="nearest").to(x.dtype)
        return doubled
    return functional.conv_transpose2d(x, _squares(x), stride=2, groups=x.shape[1])


def _squares(x: Tensor) -> Tensor:
    return x.new_ones(1, 1, 2, 2).expand(x.shape[1], 1, 2, 2)


class SelfAttention(nn.Module):
    """Self-attention in one head over all pixels, scaled with its shortcut by sqrt(1/2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _group_norm(width)
        self.query_key_value = _conv(width, 3 * width, size=1, gain=_OF_ATTENTION)
        self.output = _conv(width, width, size=1, gain=_NEARLY_ZERO)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        h: Tensor = self.output(attend(self.query_key_value(self.norm(x)), num_heads=1))
        return (x + h) * math.sqrt(0.5)


@dataclass(frozen=True)
class Place:
    """Where a block is in the network."""

    name: str  # in published run logs
    width: int  # of its output
    attention: bool = False
    resample: Resampling | None = None
    joined: bool = False  # whether it takes the output of a block of the encoder too


class Block(nn.Module):
    """Two 3x3 convolutions, to which the embedding is added between them, around a shortcut.

    `resample` halves or doubles the maps before the first convolution and in the shortcut, which then has a projection
    at any width.
    """

    def __init__(self, in_width: int, place: Place, *, embedding_features: int, dropout: float) -> None:
        super().__init__()
        width, self.resample = place.width, place.resample
        self.norm0 = _group_norm(in_width)
        self.conv0 = _conv(in_width, width)
        self.affine = _linear(embedding_features, width)
        self.norm1 = _group_norm(width)
        self.dropout = KeyedDropout(dropout)
        self.conv1 = _conv(width, width, gain=_NEARLY_ZERO)
        projected = self.resample is not None or in_width != width
        self.shortcut = _conv(in_width, width, size=1) if projected else nn.Identity()
        self.attention = SelfAttention(width) if place.attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor, keys: Tensor | None) -> Tensor:
        """[B, in_width, H, W], [B, features] and the keys [B] for dropout to [B, width, H', W']."""
        h = self._resampled(functional.silu(self.norm0(x)))
        h = self.conv0(h, self.affine(embedding))
        h = functional.silu(self.norm1(h))
        h = self.conv1(self.dropout(h, keys))
        attended: Tensor = self.attention((h + self.shortcut(self._resampled(x))) * math.sqrt(0.5))
        return attended

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample is None:
            return x
        return halve(x) if self.resample == "down" else double(x)


def _encoder(size: int, widths: Sequence[int], *, num_blocks: int, attention_sizes: Sequence[int]) -> Iterator[Place]:
    """The blocks after the first convolution, from the image's size down."""
    for depth, width in enumerate(widths):
        side = size >> depth
        if depth:
            yield Place(f"{side}x{side}_down", widths[depth - 1], resample="down")
        for number in range(num_blocks):
            yield Place(f"{side}x{side}_block{number}", width, side in attention_sizes)


def _decoder(size: int, widths: Sequence[int], *, num_blocks: int, attention_sizes: Sequence[int]) -> Iterator[Place]:
    """The blocks from the lowest resolution up: one more of each than in the encoder, of which the last attends."""
    for depth in reversed(range(len(widths))):
        side, width = size >> depth, widths[depth]
        if depth == len(widths) - 1:
            yield Place(f"{side}x{side}_in0", width, attention=True)
            yield Place(f"{side}x{side}_in1", width)
        else:
            yield Place(f"{side}x{side}_up", widths[depth + 1], resample="up")
        for number in range(num_blocks + 1):
            attention = side in attention_sizes and number == num_blocks
            yield Place(f"{side}x{side}_block{number}", width, attention, joined=True)


class DdpmppNetwork(PreconditionedNetwork):
    """The DDPM++ network with the preconditioning of Karras et al. 2022.

    With base_width 128, multipliers (2, 2, 2), 4 blocks, attention at 16 pixels and augmentation, for RGB images of 32
    pixels, it has 55,733,891 parameters; with multipliers (1, 2, 2, 2), for 64 pixels, 61,805,571.

    Args:
        image_size: The smaller of height and width in pixels; both are divisible by 2 for each resolution but the
            first. Blocks are named after it, so weights of square images fit rectangles too.
        sigmas: Noise levels [L] in units of pixels in [0, 1], descending.
        base_width: Channels of the first maps; also features of the noise level.
        multipliers: Channels at each resolution, from that of the image down, in units of base_width.
        blocks_per_resolution: Residual blocks at each resolution of the encoder; the decoder has one more.
        attention_sizes: Map sizes in pixels with self-attention, in each block of the encoder and in the last of the
            decoder. The first block of the decoder always has it.
        embedding_multiplier: Features of the embedding in units of base_width.
    """

    full_precision = ("condition_terms", "map_layer")
    condition_reader = "map_layer0"
    frequencies: Tensor

    def __init__(
        self,
        *,
        channels: int,
        image_size: int,
        sigmas: Tensor,
        base_width: int = 128,
        multipliers: Sequence[int] = (2, 2, 2),
        blocks_per_resolution: int = 4,
        attention_sizes: Sequence[int] = (16,),
        embedding_multiplier: int = 4,
        dropout: float = 0.13,
        sigma_data: float = 0.25,
        num_classes: int | None = None,
        augmentation: bool = False,
    ) -> None:
        super().__init__(sigmas=sigmas, sigma_data=sigma_data, dropout=dropout)
        widths = [base_width * multiplier for multiplier in multipliers]
        if image_size % 2 ** (len(widths) - 1):
            raise InvalidValue(
                f"{len(widths)} resolutions need an image size divisible by {2 ** (len(widths) - 1)}, got {image_size}"
            )
        sizes = [image_size >> depth for depth in range(len(widths))]
        if missing := sorted(set(attention_sizes) - set(sizes)):
            raise InvalidValue(f"attention_sizes = {missing} do not occur: feature maps have sizes {sizes}")
        features = base_width * embedding_multiplier
        exponents = torch.linspace(0, math.log(_LOWEST_FREQUENCY), base_width // 2, dtype=torch.float64)
        self.register_buffer("frequencies", exponents.exp().float(), persistent=False)
        self.condition_terms = ConditionTerms(base_width, num_classes=num_classes, augmentation=augmentation)
        self.conditions = self.condition_terms.taken
        self.map_layer0 = _linear(base_width, features)
        self.map_layer1 = _linear(features, features)
        self._encoder, self._decoder = (
            tuple(places(image_size, widths, num_blocks=blocks_per_resolution, attention_sizes=attention_sizes))
            for places in (_encoder, _decoder)
        )
        block = partial(Block, embedding_features=features, dropout=dropout)
        self._whole = f"{image_size}x{image_size}"
        self.enc = nn.ModuleDict({f"{self._whole}_conv": _conv(channels, base_width)})
        self.dec = nn.ModuleDict()
        width, skips = base_width, [base_width]
        for place in self._encoder:
            self.enc[place.name] = block(width, place)
            width = place.width
            skips.append(width)
        for place in self._decoder:
            self.dec[place.name] = block(width + (skips.pop() if place.joined else 0), place)
            width = place.width
        self.dec[f"{self._whole}_aux_norm"] = _group_norm(width)
        self.dec[f"{self._whole}_aux_conv"] = _conv(width, channels, gain=_NEARLY_ZERO)
        self.image_layers = (f"enc.{self._whole}_conv", f"dec.{self._whole}_aux_conv")
        self._number_dropout_layers()

    def _raw(self, x: Tensor, c_noise: Tensor, keys: Tensor | None = None, **conditions: Tensor | None) -> Tensor:
        # In bfloat16 the features would tell noise levels apart to a percent only.
        with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
            angles = c_noise[:, None] * self.frequencies
            embedding = self.condition_terms(torch.cat([angles.cos(), angles.sin()], dim=1), **conditions)
            # After the activation that every reader would apply.
            embedding = functional.silu(self.map_layer1(functional.silu(self.map_layer0(embedding))))
        h = self.enc[f"{self._whole}_conv"](x)
        skips = [h]
        for place in self._encoder:
            h = self.enc[place.name](h, embedding, keys)
            skips.append(h)
        for place in self._decoder:
            joined = torch.cat([h, skips.pop()], dim=1) if place.joined else h
            h = self.dec[place.name](joined, embedding, keys)
        h = functional.silu(self.dec[f"{self._whole}_aux_norm"](h))
        raw: Tensor = self.dec[f"{self._whole}_aux_conv"](h)
        return raw
