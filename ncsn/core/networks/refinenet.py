"""The RefineNet of NCSN (2019, appendix A).

Modules are registered in the order of the released code, because its optimizer states number parameters by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ncsn.core.networks.base import check_levels
from ncsn.core.networks.layers import EPS, group_norm_by_image
from ncsn.errors import InvalidValue


def instance_norm_plus(x: Tensor, *, gamma: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Compute gamma (IN(x) + alpha m) + beta, the form of the released weights.

    IN normalizes each channel of each image over its pixels. m is the channel's mean, standardized over the image's
    channels (with divisor C - 1): it restores the relative brightness of the channels, which IN removes. The paper
    prints gamma IN + beta + alpha m.

    Feature maps x [B, C, H, W] keep their floating type; the result is computed in float32, or wider if x is. gamma,
    alpha and beta are [B, C] or [C].
    """
    channels, height, width = x.shape[1:]
    # A sum over a number, since the backward pass of a mean divides maps instead of numbers.
    mean = x.sum(dim=(2, 3), dtype=torch.promote_types(x.dtype, torch.float32)) / (height * width)
    channel_variance, channel_mean = torch.var_mean(mean, dim=1, keepdim=True)
    standardized = (mean - channel_mean) * torch.rsqrt(channel_variance + EPS)
    scale = gamma.to(mean.dtype).expand_as(mean)
    shift = scale * alpha * standardized + beta
    return group_norm_by_image(x, groups=channels, scale=scale, shift=shift.to(mean.dtype))


class ConditionalInstanceNormPlus(nn.Module):
    """Instance normalization++ with parameters per noise level: a row [gamma | alpha | beta] of `embed` for each."""

    def __init__(self, num_features: int, *, num_levels: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_levels, 3 * num_features)
        with torch.no_grad():
            self.embed.weight[:, : 2 * num_features].normal_(1.0, 0.02)
            self.embed.weight[:, 2 * num_features :].zero_()

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Normalize x [B, C, H, W] at level int64 [B]."""
        gamma, alpha, beta = self.embed(level).chunk(3, dim=1)
        return instance_norm_plus(x, gamma=gamma, alpha=alpha, beta=beta)


def elu(x: Tensor) -> Tensor:
    """Compute x where x is positive, else exp(x) - 1."""
    # PyTorch's elu saves its argument. This one saves its result, which the next layer saves too, and its backward pass
    # has no exponential. In bfloat16 a derivative far below 1 is then accurate to a percent.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return functional.elu(x)
    y: Tensor = _Elu.apply(x)
    return y


class _Elu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = functional.elu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        x_gradient: Tensor = torch.ops.aten.elu_backward(gradients[0], 1.0, 1.0, 1.0, True, y)
        return x_gradient


def average_pool(x: Tensor) -> Tensor:
    """5x5 mean with stride 1, over zeros outside the map too; NCSN's chained pooling."""
    if x.device.type != "cpu":
        return functional.avg_pool2d(x, kernel_size=5, stride=1, padding=2, count_include_pad=True)
    # On a CPU PyTorch's pooling takes 10 times as long as a convolution with ones, and its backward pass 20 times.
    channels = x.shape[1]
    return functional.conv2d(x, x.new_ones(1, 1, 5, 5).expand(channels, 1, 5, 5), padding=2, groups=channels) / 25


def conv3x3(in_channels: int, out_channels: int, *, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    """A 3x3 convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=dilation, dilation=dilation, bias=bias)


class _PooledConv(nn.Module):
    """An undilated convolution followed by a 2x2 mean pool."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return functional.avg_pool2d(self.conv(x), kernel_size=2)
        # Each pooled pixel is a convolution with the mean of the kernel at four places, at every second pixel. On a CPU
        # the pooling took longer than the convolution.
        wide = functional.pad(self.conv.weight, (1, 1, 1, 1))
        weight = (wide[..., 1:, :] + wide[..., :-1, :]) / 4
        weight = weight[..., 1:] + weight[..., :-1]
        return functional.conv2d(x, weight, self.conv.bias, stride=2, padding=self.conv.padding)


class ResidualBlock(nn.Module):
    """Pre-activation residual block: shortcut(x) + conv2(ELU(norm2(conv1(ELU(norm1(x)))))).

    Args:
        down: Change the channels, and halve height and width unless dilated: with dilation the size stays.
        dilation: Of all 3x3 convolutions.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, num_levels: int, down: bool = False, dilation: int | None = None
    ) -> None:
        super().__init__()
        assert down or in_channels == out_channels
        spread = dilation or 1
        middle = in_channels if down else out_channels
        conv2 = conv3x3(middle, out_channels, dilation=spread)
        halves = down and dilation is None
        self.conv1 = conv3x3(in_channels, middle, dilation=spread)
        self.normalize2 = ConditionalInstanceNormPlus(middle, num_levels=num_levels)
        self.conv2 = _PooledConv(conv2) if halves else conv2
        if halves:
            self.shortcut: nn.Module | None = _PooledConv(nn.Conv2d(in_channels, out_channels, kernel_size=1))
        elif down:
            self.shortcut = conv3x3(in_channels, out_channels, dilation=spread)
        else:
            self.shortcut = None
        self.normalize1 = ConditionalInstanceNormPlus(in_channels, num_levels=num_levels)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Transform x [B, in_channels, H, W] at level int64 [B]."""
        h: Tensor = self.conv1(elu(self.normalize1(x, level)))
        h = self.conv2(elu(self.normalize2(h, level)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class ResidualStage(nn.ModuleList):
    """Two residual blocks, of which the first may change channels and size."""

    def __init__(
        self, in_channels: int, out_channels: int, *, num_levels: int, down: bool = False, dilation: int | None = None
    ) -> None:
        first = ResidualBlock(in_channels, out_channels, num_levels=num_levels, down=down, dilation=dilation)
        super().__init__([first, ResidualBlock(out_channels, out_channels, num_levels=num_levels, dilation=dilation)])

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Transform x [B, in_channels, H, W] at level int64 [B]."""
        for block in self:
            x = block(x, level)
        return x


class ResidualConvUnit(nn.Module):
    """RCU: blocks of x + conv(ELU(norm(conv(ELU(norm(x)))))), without biases."""

    def __init__(self, channels: int, *, num_blocks: int, num_levels: int) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        for block in range(1, num_blocks + 1):
            for stage in (1, 2):
                norm = ConditionalInstanceNormPlus(channels, num_levels=num_levels)
                self.add_module(f"{block}_{stage}_norm", norm)
                self.add_module(f"{block}_{stage}_conv", conv3x3(channels, channels, bias=False))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Transform x [B, channels, H, W] at level int64 [B]."""
        for block in range(1, self.num_blocks + 1):
            h = x
            for stage in (1, 2):
                h = elu(getattr(self, f"{block}_{stage}_norm")(h, level))
                h = getattr(self, f"{block}_{stage}_conv")(h)
            x = x + h
        return x


class _ConvsThenNorms(nn.Module):
    """Pairs of a normalization and a convolution, registered convolutions first."""

    def __init__(self, convs: Sequence[nn.Conv2d], *, num_levels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(
            ConditionalInstanceNormPlus(conv.in_channels, num_levels=num_levels) for conv in convs
        )


class MultiScaleFusion(_ConvsThenNorms):
    """MSF: the sum of conv(norm(x_k)), each resized to one size by bilinear interpolation with aligned corners."""

    def __init__(self, in_channels: Sequence[int], out_channels: int, *, num_levels: int) -> None:
        super().__init__([conv3x3(channels, out_channels) for channels in in_channels], num_levels=num_levels)

    def forward(self, xs: Sequence[Tensor], level: Tensor, size: torch.Size) -> Tensor:
        """Fuse xs, each [B, in_channels[k], H_k, W_k], to [B, out_channels, *size]."""
        terms = []
        for conv, normalize, x in zip(self.convs, self.norms, xs, strict=True):
            h = conv(normalize(x, level))
            if h.shape[2:] != size:
                # Back in the maps' type, since autocast on a GPU interpolates in float32.
                h = functional.interpolate(h, size=tuple(size), mode="bilinear", align_corners=True).to(h.dtype)
            terms.append(h)
        fused: Tensor = terms[0] + terms[1]
        return fused


class ChainedResidualPooling(_ConvsThenNorms):
    """CRP: x = ELU(x), then twice p = conv(pool(norm(p))), x = x + p, where p starts as x."""

    def __init__(self, channels: int, *, num_levels: int) -> None:
        super().__init__([conv3x3(channels, channels, bias=False) for _ in range(2)], num_levels=num_levels)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Transform x [B, channels, H, W] at level int64 [B]."""
        x = pooled = elu(x)
        for conv, normalize in zip(self.convs, self.norms, strict=True):
            pooled = conv(average_pool(normalize(pooled, level)))
            x = x + pooled
        return x


class RefineBlock(nn.Module):
    """RefineNet block: an RCU per input, their fusion, chained pooling, and an output RCU.

    Args:
        in_channels: Of each input: [encoder, previous refine block], or the encoder alone.
        end: Whether this is the last block, which has three output blocks instead of one.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, *, num_levels: int, end: bool = False) -> None:
        super().__init__()
        assert len(in_channels) == 2 or list(in_channels) == [out_channels]
        self.adapt_convs = nn.ModuleList(ResidualConvUnit(c, num_blocks=2, num_levels=num_levels) for c in in_channels)
        self.output_convs = ResidualConvUnit(out_channels, num_blocks=3 if end else 1, num_levels=num_levels)
        if len(in_channels) > 1:
            self.msf = MultiScaleFusion(in_channels, out_channels, num_levels=num_levels)
        self.crp = ChainedResidualPooling(out_channels, num_levels=num_levels)

    def forward(self, xs: Sequence[Tensor], level: Tensor) -> Tensor:
        """Refine xs to [B, out_channels, H, W] of the first input's size."""
        adapted = [adapt(x, level) for adapt, x in zip(self.adapt_convs, xs, strict=True)]
        fused = self.msf(adapted, level, xs[0].shape[2:]) if len(adapted) > 1 else adapted[0]
        refined: Tensor = self.output_convs(self.crp(fused, level), level)
        return refined


class NcsnNetwork(nn.Module):
    """Score network s(x, level) with instance normalization++ conditioned on the level.

    An encoder of residual stages and a decoder of refine blocks. Parameters and their names are those of the released
    weights: 30,117,635 for 32x32x3 (num_features 128), 7,638,657 for 28x28x1 (num_features 64), with 10 levels. The
    first layer sees 2x - 1 of images in [0, 1].
    """

    image_layers = ("begin_conv", "end_conv")

    def __init__(self, num_features: int = 128, *, channels: int, num_levels: int) -> None:
        super().__init__()
        n, self.num_levels = num_features, num_levels
        self.begin_conv = conv3x3(channels, n)
        self.normalizer = ConditionalInstanceNormPlus(n, num_levels=num_levels)
        self.end_conv = conv3x3(n, channels)
        # The second stage halves the image; the third and the fourth are dilated instead.
        self.res1 = ResidualStage(n, n, num_levels=num_levels)
        self.res2 = ResidualStage(n, 2 * n, num_levels=num_levels, down=True)
        self.res3 = ResidualStage(2 * n, 2 * n, num_levels=num_levels, down=True, dilation=2)
        self.res4 = ResidualStage(2 * n, 2 * n, num_levels=num_levels, down=True, dilation=4)
        self.refine1 = RefineBlock([2 * n], 2 * n, num_levels=num_levels)
        self.refine2 = RefineBlock([2 * n, 2 * n], 2 * n, num_levels=num_levels)
        self.refine3 = RefineBlock([2 * n, 2 * n], n, num_levels=num_levels)
        self.refine4 = RefineBlock([n, n], n, num_levels=num_levels, end=True)

    def forward(self, x: Tensor, level: Tensor | None = None, *, sigma: Tensor | None = None) -> Tensor:
        """Score of noisy images at their levels; InvalidValue for any other sigma.

        Args:
            x: [B, C, H, W] around [0, 1], H and W even.
            level: int64 [B], 0 = most noise.

        Returns:
            Score [B, C, H, W] per pixel unit of x; there is no scaling by 1 / sigma.
        """
        if level is None or sigma is not None:
            raise InvalidValue("a network of kind ncsn knows its own noise levels only; unet and ddpmpp take any sigma")
        check_levels(level, batch=len(x), num_levels=self.num_levels)
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise InvalidValue(f"this network needs an even height and width, got {x.shape[2]} x {x.shape[3]} pixels")
        first = self.res1(self.begin_conv(2 * x - 1), level)
        second = self.res2(first, level)
        third = self.res3(second, level)
        h = self.refine1([self.res4(third, level)], level)
        for refine, skip in ((self.refine2, third), (self.refine3, second), (self.refine4, first)):
            h = refine([skip, h], level)
        out: Tensor = self.end_conv(elu(self.normalizer(h, level)))
        return out
