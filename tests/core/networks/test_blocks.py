"""The parts of the RefineNets against their definitions in the spec (1.3), recomputed here with torch.nn.functional."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from ncsn.core.networks.normalization import ConditionalInstanceNormPlus
from ncsn.core.networks.refinenet import (
    MultiScaleFusion,
    average_pool,
    elu,
    max_pool,
)

NORM = partial(ConditionalInstanceNormPlus, num_levels=3)
LEVEL = torch.tensor([0, 2])


mean_pool_5 = partial(functional.avg_pool2d, kernel_size=5, stride=1, padding=2)
max_pool_5 = partial(functional.max_pool2d, kernel_size=5, stride=1, padding=2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.oracle(15)
def test_average_pool_counts_the_padding():
    ones = average_pool(torch.ones(1, 1, 6, 6))[0, 0]
    assert ones[0, 0].item() == pytest.approx(9 / 25) and ones[0, 3].item() == pytest.approx(15 / 25)
    assert ones[2, 2].item() == pytest.approx(1)


def test_max_pool_takes_the_maximum_and_ignores_the_padding():
    x = torch.full((1, 1, 6, 6), -2.0)
    x[0, 0, 0, 0] = -1.0
    pooled = max_pool(x)[0, 0]
    assert pooled[2, 2] == -1 and pooled[0, 3] == -2 and pooled[5, 5] == -2


def test_fusion_interpolates_with_aligned_corners():
    fusion = MultiScaleFusion([2, 3], 1, norm=None)
    with torch.no_grad():
        for conv in fusion.convs:
            conv.weight.zero_()
            conv.bias.zero_()
        fusion.convs[1].weight[0, 0, 1, 1] = 1.0
    low = torch.zeros(1, 3, 2, 2)
    low[0, 0] = torch.tensor([[0.0, 3.0], [0.0, 3.0]])
    fused = fusion([torch.randn(1, 2, 4, 4), low], torch.zeros(1, dtype=torch.int64), torch.Size([4, 4]))
    torch.testing.assert_close(fused[0, 0], torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(4, 4))


@pytest.mark.parametrize(("ours", "theirs"), [(average_pool, mean_pool_5), (max_pool, max_pool_5)])
def test_pools_and_their_gradients_are_those_of_pytorch(ours, theirs):
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(ours(x), theirs(x))
    seed = torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad(pool(x), x, seed)[0] for pool in (ours, theirs)))


def test_values_are_pytorch_s_and_derivatives_those_of_differences() -> None:
    x = torch.tensor([-30.0, -3.0, -0.5, -1e-3, 0.7, 5.0], dtype=torch.float64, requires_grad=True)
    assert torch.equal(elu(x), functional.elu(x))
    assert gradcheck(elu, (x,))
    assert gradgradcheck(elu, (x,))
