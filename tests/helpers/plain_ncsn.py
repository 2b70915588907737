"""The network of Song & Ermon 2019 (appendix A) as plain code, written from the paper and not optimized.

An independent check of ncsn.core.networks.refinenet: parameters have the same names, so each loads the other's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class PlainNorm(nn.Module):
    """Conditional instance normalization++: gamma (IN(x) + alpha m) + beta."""

    def __init__(self, channels: int, num_levels: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_levels, 3 * channels)
        nn.init.normal_(self.embed.weight[:, : 2 * channels].data, 1.0, 0.02)
        nn.init.zeros_(self.embed.weight[:, 2 * channels :].data)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """[B, C, H, W] at level [B]."""
        gamma, alpha, beta = self.embed(level)[:, :, None, None].chunk(3, dim=1)
        means = x.mean(dim=(2, 3), keepdim=True)
        center, spread = means.mean(dim=1, keepdim=True), means.var(dim=1, keepdim=True)
        standardized = (means - center) / torch.sqrt(spread + 1e-5)
        return gamma * (functional.instance_norm(x) + alpha * standardized) + beta


def conv3x3(inside: int, outside: int, *, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(inside, outside, 3, padding=dilation, dilation=dilation, bias=bias)


class MeanPooled(nn.Module):
    """A convolution and the mean of the four stride-2 phases."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to half the height and width."""
        h = self.conv(x)
        return (h[:, :, ::2, ::2] + h[:, :, 1::2, ::2] + h[:, :, ::2, 1::2] + h[:, :, 1::2, 1::2]) / 4


class PlainResidual(nn.Module):
    """Pre-activation residual block."""

    def __init__(self, inside: int, outside: int, num_levels: int, *, down: bool = False, dilation: int = 1) -> None:
        super().__init__()
        middle, halves = (inside if down else outside), down and dilation == 1
        self.conv1 = conv3x3(inside, middle, dilation=dilation)
        self.normalize2 = PlainNorm(middle, num_levels)
        conv2 = conv3x3(middle, outside, dilation=dilation)
        self.conv2 = MeanPooled(conv2) if halves else conv2
        if halves:
            self.shortcut: nn.Module = MeanPooled(nn.Conv2d(inside, outside, 1))
        else:
            self.shortcut = conv3x3(inside, outside, dilation=dilation) if down else nn.Identity()
        self.normalize1 = PlainNorm(inside, num_levels)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """[B, inside, H, W] at level [B]."""
        h = self.conv1(functional.elu(self.normalize1(x, level)))
        return self.shortcut(x) + self.conv2(functional.elu(self.normalize2(h, level)))


class PlainUnit(nn.Module):
    """Residual convolution unit: blocks of two ELU-convolutions."""

    def __init__(self, channels: int, num_levels: int, *, blocks: int) -> None:
        super().__init__()
        self.names = [[f"{block}_{stage}" for stage in (1, 2)] for block in range(1, blocks + 1)]
        for name in (name for names in self.names for name in names):
            self.add_module(f"{name}_norm", PlainNorm(channels, num_levels))
            self.add_module(f"{name}_conv", conv3x3(channels, channels, bias=False))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """[B, channels, H, W] at level [B]."""
        for names in self.names:
            h = x
            for name in names:
                h = getattr(self, f"{name}_conv")(functional.elu(getattr(self, f"{name}_norm")(h, level)))
            x = x + h
        return x


class PlainPairs(nn.Module):
    """Convolutions and the normalization before each."""

    def __init__(self, convs: list[nn.Conv2d], num_levels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(PlainNorm(conv.in_channels, num_levels) for conv in convs)


class PlainRefine(nn.Module):
    """RefineNet block."""

    def __init__(self, inside: list[int], outside: int, num_levels: int, *, last: bool = False) -> None:
        super().__init__()
        self.adapt_convs = nn.ModuleList(PlainUnit(channels, num_levels, blocks=2) for channels in inside)
        self.output_convs = PlainUnit(outside, num_levels, blocks=3 if last else 1)
        if len(inside) > 1:
            self.msf = PlainPairs([conv3x3(channels, outside) for channels in inside], num_levels)
        self.crp = PlainPairs([conv3x3(outside, outside, bias=False) for _ in range(2)], num_levels)

    def forward(self, xs: list[Tensor], level: Tensor) -> Tensor:
        """Join the inputs at the first one's size."""
        hs = [adapt(x, level) for adapt, x in zip(self.adapt_convs, xs, strict=True)]
        x = hs[0]
        if len(hs) > 1:
            size = xs[0].shape[2:]
            hs = [conv(norm(h, level)) for h, conv, norm in zip(hs, self.msf.convs, self.msf.norms, strict=True)]
            x = sum(functional.interpolate(h, size=size, mode="bilinear", align_corners=True) for h in hs)
        x = pooled = functional.elu(x)
        for conv, norm in zip(self.crp.convs, self.crp.norms, strict=True):
            pooled = conv(functional.avg_pool2d(norm(pooled, level), 5, stride=1, padding=2))
            x = x + pooled
        return self.output_convs(x, level)


class PlainNcsn(nn.Module):
    """The score network, for images in [0, 1]."""

    def __init__(self, num_features: int, *, channels: int, num_levels: int) -> None:
        super().__init__()
        n, levels = num_features, num_levels

        def stage(inside: int, outside: int, *, down: bool = True, dilation: int = 1) -> nn.ModuleList:
            first = PlainResidual(inside, outside, levels, down=down, dilation=dilation)
            return nn.ModuleList([first, PlainResidual(outside, outside, levels, dilation=dilation)])

        self.begin_conv = conv3x3(channels, n)
        self.normalizer = PlainNorm(n, levels)
        self.end_conv = conv3x3(n, channels)
        self.res1 = stage(n, n, down=False)
        self.res2 = stage(n, 2 * n)
        self.res3 = stage(2 * n, 2 * n, dilation=2)
        self.res4 = stage(2 * n, 2 * n, dilation=4)
        self.refine1 = PlainRefine([2 * n], 2 * n, levels)
        self.refine2 = PlainRefine([2 * n, 2 * n], 2 * n, levels)
        self.refine3 = PlainRefine([2 * n, 2 * n], n, levels)
        self.refine4 = PlainRefine([n, n], n, levels, last=True)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Score of [B, C, H, W] at level [B]."""
        h, maps = self.begin_conv(2 * x - 1), []
        for stage in (self.res1, self.res2, self.res3, self.res4):
            for block in stage:
                h = block(h, level)
            maps.append(h)
        h = self.refine1([maps[3]], level)
        h = self.refine2([maps[2], h], level)
        h = self.refine3([maps[1], h], level)
        h = self.refine4([maps[0], h], level)
        return self.end_conv(functional.elu(self.normalizer(h, level)))
