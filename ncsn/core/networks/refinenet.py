"""The RefineNets of NCSN (2019) and NCSNv2 (2020)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ncsn.core.networks.blocks import RefineBlock, ResidualStage, average_pool, check_size, conv3x3, elu, max_pool
from ncsn.core.networks.entry import ContinuousNetwork, check_conditions, check_levels
from ncsn.core.networks.normalization import ConditionalInstanceNormPlus, InstanceNormPlus, NormFactory

Depth = Literal["standard", "deeper", "deepest"]


class _Stage(NamedTuple):
    """An encoder stage and the refine block that takes its output, widths in units of num_features."""

    suffix: str
    inside: int
    out: int
    dilation: int | None
    refine_suffix: str
    refine_in: tuple[int, ...]
    refine_out: int


# From the image down. The first stage keeps the size; of the others those without dilation halve it.
_FIRST, _SECOND = _Stage("1", 1, 1, None, "5", (1, 1), 1), _Stage("2", 1, 2, None, "4", (2, 2), 1)
_THIRD, _FOURTH = _Stage("3", 2, 2, None, "3", (2, 2), 2), _Stage("4", 2, 4, 2, "2", (4, 4), 2)
_FIFTH = _Stage("5", 4, 4, 4, "1", (4,), 4)
_STAGES: dict[Depth, tuple[_Stage, ...]] = {
    "standard": (
        _Stage("1", 1, 1, None, "4", (1, 1), 1),
        _Stage("2", 1, 2, None, "3", (2, 2), 1),
        _Stage("3", 2, 2, 2, "2", (2, 2), 2),
        _Stage("4", 2, 2, 4, "1", (2,), 2),
    ),
    "deeper": (_FIRST, _SECOND, _THIRD, _FOURTH, _FIFTH),
    "deepest": (_FIRST, _SECOND, _THIRD, _Stage("31", 2, 2, None, "31", (2, 2), 2), _FOURTH, _FIFTH),
}


class _RefineNet(nn.Module):
    """What both networks share: an encoder of residual stages and a decoder of refine blocks, without scaling."""

    def __init__(
        self,
        num_features: int,
        *,
        channels: int,
        depth: Depth,
        norm: NormFactory,
        refine: Callable[..., RefineBlock],
    ) -> None:
        super().__init__()
        n, stages = num_features, _STAGES[depth]
        self.begin_conv = conv3x3(channels, n)
        self.normalizer = norm(n)
        self.end_conv = conv3x3(n, channels)
        for index, stage in enumerate(stages):
            module = ResidualStage(n * stage.inside, n * stage.out, norm=norm, down=index > 0, dilation=stage.dilation)
            self.add_module(f"res{stage.suffix}", module)
        # By name, as in the released code: refine31 is registered after refine3, though it is used before it.
        for stage in sorted(stages, key=lambda stage: stage.refine_suffix):
            inputs = [n * width for width in stage.refine_in]
            self.add_module(
                f"refine{stage.refine_suffix}", refine(inputs, n * stage.refine_out, end=stage is stages[0])
            )
        self._encoder = [f"res{stage.suffix}" for stage in stages]
        self._decoder = [f"refine{stage.refine_suffix}" for stage in reversed(stages)]
        self._halvings = sum(stage.dilation is None for stage in stages[1:])

    def _unscaled(self, x: Tensor, level: Tensor) -> Tensor:
        check_size(x, halvings=self._halvings)
        h: Tensor = self.begin_conv(2 * x - 1)
        features = []
        for name in self._encoder:
            h = self.get_submodule(name)(h, level)
            features.append(h)
        for index, name in enumerate(self._decoder):
            skip = features.pop()
            h = self.get_submodule(name)([skip] if index == 0 else [skip, h], level)
        out: Tensor = self.end_conv(elu(self.normalizer(h, level)))
        return out


class NcsnNetwork(_RefineNet):
    """Score network s(x, level) with instance normalization++ conditioned on the level.

    Parameters and their names are those of the released weights: 30,117,635 for 32x32x3 (num_features 128), 7,638,657
    for 28x28x1 (num_features 64), with 10 levels. The first layer sees 2x - 1 of images in [0, 1].
    """

    def __init__(self, num_features: int, *, channels: int, num_levels: int) -> None:
        norm: NormFactory = partial(ConditionalInstanceNormPlus, num_levels=num_levels)
        refine = partial(RefineBlock, norm=norm, pool=average_pool)
        super().__init__(num_features, channels=channels, depth="standard", norm=norm, refine=refine)
        self.num_levels = num_levels

    def forward(self, x: Tensor, level: Tensor | None = None, **others: Tensor | None) -> Tensor:
        """Score of noisy images at their levels; `others`, sigma and conditions, must be None.

        Args:
            x: [B, C, H, W] around [0, 1], H and W even.
            level: int64 [B], 0 = most noise.

        Returns:
            Score [B, C, H, W] per pixel unit of x; there is no scaling by 1 / sigma.
        """
        check_conditions(self, [name for name, value in others.items() if value is not None])
        if level is None:
            raise ValueError("this network needs a level")
        check_levels(level, batch=len(x), num_levels=self.num_levels)
        return self._unscaled(x, level)


class NcsnV2Network(_RefineNet, ContinuousNetwork):
    """Score network s(x, sigma) = f(x) / sigma with an unconditional f (technique 3).

    Parameters and their names are those of the released weights: with num_features 128 and RGB images 29,694,083 for
    depth `standard` (up to 64 pixels), 83,445,379 for `deeper` (128) and 94,132,611 for `deepest` (256). These have 4,
    5 and 6 stages, which halve the image 1, 2 and 3 times. The first layer sees 2x - 1 of
    images in [0, 1].
    """

    def __init__(self, num_features: int, *, channels: int, sigmas: Tensor, depth: Depth = "standard") -> None:
        refine = partial(RefineBlock, norm=None, pool=max_pool)
        super().__init__(num_features, channels=channels, depth=depth, norm=InstanceNormPlus, refine=refine)
        self.register_buffer("sigmas", sigmas.detach().clone().to(torch.float32))

    def score_at(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Score [B, C, H, W] per pixel unit of x at sigma [B]; H, W divisible by 2, 4 or 8 according to the depth."""
        # The blocks pass a level to their norms, which do not use it here.
        return self._unscaled(x, torch.empty(0)) / sigma.to(x.dtype).view(-1, 1, 1, 1)
