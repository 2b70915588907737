"""The noise conditional score network of the 2019 paper (appendix A): a 4-stage RefineNet."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ncsn.core.networks.activation import elu
from ncsn.core.networks.blocks import RefineBlock, ResidualStage, average_pool, check_levels, check_size, conv3x3
from ncsn.core.networks.normalization import ConditionalInstanceNormPlus

if TYPE_CHECKING:
    from ncsn.core.networks.normalization import NormFactory


class NcsnNetwork(nn.Module):
    """Score network s(x, level) with instance normalisation++ conditioned on the level.

    Parameters and their names are those of the released weights: 30,117,635 for 32x32x3 (num_features 128), 7,638,657
    for 28x28x1 (num_features 64), with 10 levels.

    Args:
        num_features: Channels of the first stage, twice that in the later ones.
        channels: Channels of the images.
        num_levels: Number of noise levels L.
        rescale: Feed 2x - 1 to the first layer, for images in [0, 1]; off for logit-transformed ones.
    """

    def __init__(self, num_features: int, *, channels: int, num_levels: int, rescale: bool = True) -> None:
        super().__init__()
        n = num_features
        norm: NormFactory = partial(ConditionalInstanceNormPlus, num_levels=num_levels)
        refine = partial(RefineBlock, norm=norm, pool=average_pool)
        self.num_levels = num_levels
        self.rescale = rescale
        self.begin_conv = conv3x3(channels, n)
        self.normalizer = norm(n)
        self.end_conv = conv3x3(n, channels)
        self.res1 = ResidualStage(n, n, norm=norm)
        self.res2 = ResidualStage(n, 2 * n, norm=norm, down=True)
        self.res3 = ResidualStage(2 * n, 2 * n, norm=norm, down=True, dilation=2)
        self.res4 = ResidualStage(2 * n, 2 * n, norm=norm, down=True, dilation=4)
        self.refine1 = refine([2 * n], 2 * n)
        self.refine2 = refine([2 * n, 2 * n], 2 * n)
        self.refine3 = refine([2 * n, 2 * n], n)
        self.refine4 = refine([n, n], n, end=True)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Score of noisy images.

        Args:
            x: [B, C, H, W] around [0, 1], H and W even.
            level: int64 [B], 0 = most noise.

        Returns:
            Score [B, C, H, W] per pixel unit of x; there is no scaling by 1 / sigma.
        """
        check_levels(level, batch=len(x), num_levels=self.num_levels)
        check_size(x, halvings=1)
        stage1 = self.res1(self.begin_conv(2 * x - 1 if self.rescale else x), level)
        stage2 = self.res2(stage1, level)
        stage3 = self.res3(stage2, level)
        stage4 = self.res4(stage3, level)
        h = self.refine1([stage4], level)
        h = self.refine2([stage3, h], level)
        h = self.refine3([stage2, h], level)
        h = self.refine4([stage1, h], level)
        score: Tensor = self.end_conv(elu(self.normalizer(h, level)))
        return score
