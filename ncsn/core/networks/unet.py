"""A compact U-Net with the preconditioning of Karras et al. 2022 (section 5).

It can be trained at any noise level, from far below to far above the spread of the data, and evaluated between levels.
The layout is fast on a CPU and on a GPU: feature maps are NCHW because PyTorch's group norm is several times faster
then than with channels last, and FiLM is the affine part of a group norm instead of extra passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from ncsn.core.networks.base import ConditionTerms, PreconditionedNetwork, attend, num_groups
from ncsn.core.networks.layers import Conv2d, GroupNorm, KeyedDropout, group_norm_by_image
from ncsn.errors import InvalidValue

# The embedding's frequencies per unit of ln(sigma) / 4, which spans about two units over a useful schedule: the lowest
# separates large from small, the highest separates levels that differ by a few percent.
LOWEST_FREQUENCY = 0.5
HIGHEST_FREQUENCY = 50.0


def _zeroed(layer: Conv2d) -> Conv2d:
    """The same layer, starting at zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class NoiseEmbedding(nn.Module):
    """Cosines and sines of c_noise = ln(sigma) / 4, what the conditions add to them, and two layers."""

    frequencies: Tensor

    def __init__(self, features: int, *, num_classes: int | None, augmentation: bool) -> None:
        super().__init__()
        half = max(2, features // 2)
        exponents = torch.linspace(math.log(LOWEST_FREQUENCY), math.log(HIGHEST_FREQUENCY), half, dtype=torch.float64)
        self.register_buffer("frequencies", exponents.exp().float(), persistent=False)
        self.linear1 = nn.Linear(2 * half, features)
        self.linear2 = nn.Linear(features, features)
        self.condition_terms = ConditionTerms(2 * half, num_classes=num_classes, augmentation=augmentation)

    def forward(self, c_noise: Tensor, **conditions: Tensor | None) -> Tensor:
        """[B] to [B, features], after the activation that every reader would apply."""
        angles = c_noise[:, None] * self.frequencies
        h = self.condition_terms(torch.cat([angles.cos(), angles.sin()], dim=1), **conditions)
        return functional.silu(self.linear2(functional.silu(self.linear1(h))))


class SelfAttention(nn.Module):
    """Residual self-attention over all pixels of the feature map, in heads of about 64 channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = math.gcd(width, max(1, width // 64))
        self.norm = GroupNorm(num_groups(width), width)
        self.query_key_value = Conv2d(width, 3 * width, 1)
        self.output = _zeroed(Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        query_key_value = self.query_key_value(self.norm(x))
        y: Tensor = x + self.output(attend(query_key_value, num_heads=self.num_heads))
        return y


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, the second one conditioned on the noise, around a shortcut; starts as the shortcut."""

    def __init__(
        self, in_width: int, *, out_width: int, embedding_features: int, dropout: float, attention: bool
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(num_groups(in_width), in_width)
        self.conv1 = Conv2d(in_width, out_width, 3, padding=1)
        self.film = nn.Linear(embedding_features, 2 * out_width)
        self.dropout = KeyedDropout(dropout)
        self.conv2 = _zeroed(Conv2d(out_width, out_width, 3, padding=1))
        self.shortcut = Conv2d(in_width, out_width, 1) if in_width != out_width else nn.Identity()
        self.attention = SelfAttention(out_width) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor, keys: Tensor | None) -> Tensor:
        """[B, in_width, H, W], [B, features] and the keys [B] for dropout to [B, out_width, H, W]."""
        h = self.conv1(functional.silu(self.norm1(x)))
        # A group norm whose scale and shift are a linear function of the embedding (FiLM).
        scale, shift = self.film(embedding).to(torch.promote_types(h.dtype, torch.float32)).chunk(2, dim=1)
        h = group_norm_by_image(h, groups=num_groups(h.shape[1]), scale=1 + scale, shift=shift)
        h = self.conv2(self.dropout(functional.silu(h), keys))
        attended: Tensor = self.attention(self.shortcut(x) + h)
        return attended


class UnetNetwork(PreconditionedNetwork):
    """A compact U-Net with the preconditioning of Karras et al. 2022. A fresh one predicts zero before it.

    Args:
        image_size: The smaller of height and width in pixels. Decides where attention goes; others are accepted too.
        sigmas: Noise levels [L] in units of pixels in [0, 1], descending.
        widths: Channels at each resolution, from that of the image; each next one has half the size, rounded up.
        attention_sizes: Feature map sizes in pixels, counted as `image_size`, with self-attention after each residual
            block.
    """

    condition_reader = "embedding.linear1"
    image_layers = ("input", "output")

    def __init__(
        self,
        *,
        channels: int,
        image_size: int,
        sigmas: Tensor,
        widths: Sequence[int] = (32, 64, 64),
        blocks_per_resolution: int = 2,
        embedding_features: int = 128,
        attention_sizes: Sequence[int] = (),
        dropout: float = 0.0,
        sigma_data: float = 0.25,
        num_classes: int | None = None,
        augmentation: bool = False,
    ) -> None:
        super().__init__(sigmas=sigmas, sigma_data=sigma_data, dropout=dropout)
        sizes = [image_size]  # of the feature maps in pixels, from the image's own down
        while len(sizes) < len(widths):
            if sizes[-1] < 2:
                raise InvalidValue(
                    f"widths has {len(widths)} entries, but a {image_size}-pixel image can be halved only "
                    f"{len(sizes) - 1} times; use at most {len(sizes)} widths"
                )
            sizes.append((sizes[-1] + 1) // 2)
        if missing := sorted(set(attention_sizes) - set(sizes)):
            raise InvalidValue(
                f"attention_sizes = {missing} do not occur: feature maps of a {image_size}-pixel image with "
                f"{len(widths)} widths have sizes {sizes}; choose among these"
            )
        self.embedding = NoiseEmbedding(embedding_features, num_classes=num_classes, augmentation=augmentation)
        self.conditions = self.embedding.condition_terms.taken
        self.input = Conv2d(channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        self.downsample = nn.ModuleList()
        self.upsample = nn.ModuleList()
        block = partial(ResidualBlock, embedding_features=embedding_features, dropout=dropout)
        for depth, (width, size) in enumerate(zip(widths, sizes, strict=True)):
            lowest, attention = depth == len(widths) - 1, size in attention_sizes
            # On the way up all but the lowest resolution join the enlarged map with that of the way down at this size.
            for stages, in_width in ((self.down, width), (self.up, width if lowest else 2 * width)):
                ins = [in_width] + [width] * (blocks_per_resolution - 1)
                stages.append(nn.ModuleList(block(each, out_width=width, attention=attention) for each in ins))
            if not lowest:
                self.downsample.append(Conv2d(width, widths[depth + 1], 3, stride=2, padding=1))
                self.upsample.append(Conv2d(widths[depth + 1], width, 1))
        self.output_norm = GroupNorm(num_groups(widths[0]), widths[0])
        self.output = _zeroed(Conv2d(widths[0], channels, 3, padding=1))
        self._number_dropout_layers()

    def _raw(self, x: Tensor, c_noise: Tensor, keys: Tensor | None = None, **conditions: Tensor | None) -> Tensor:
        # On a GPU autocast computes norms and interpolations in float32; their results return to the maps' type.
        embedding = self.embedding(c_noise, **conditions)
        h = self.input(x)
        skips: list[Tensor] = []
        for depth, stage in enumerate(self.down):
            h = h if depth == 0 else self.downsample[depth - 1](h)
            for block in stage.children():
                h = block(h, embedding, keys)
            skips.append(h)
        h = skips.pop()
        for depth in reversed(range(len(self.up))):
            if depth < len(self.upsample):
                # On a CPU the NCHW kernel is 20 times slower than the channels-last one and both reorderings.
                h, skip = self.upsample[depth](h).contiguous(memory_format=torch.channels_last), skips.pop()
                h = functional.interpolate(h, size=tuple(skip.shape[2:]), mode="nearest").to(h.dtype).contiguous()
                h = torch.cat([h, skip], dim=1)
            for block in self.up[depth].children():
                h = block(h, embedding, keys)
        raw: Tensor = self.output(functional.silu(self.output_norm(h)))
        return raw
