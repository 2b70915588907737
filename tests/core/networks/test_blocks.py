"""The parts of the RefineNets against their definitions in the spec (1.3), recomputed here with torch.nn.functional."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from ncsn.core.networks.blocks import (
    ChainedResidualPooling,
    MultiScaleFusion,
    RefineBlock,
    ResidualBlock,
    ResidualConvUnit,
    average_pool,
    elu,
    max_pool,
)
from ncsn.core.networks.normalization import ConditionalInstanceNormPlus

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


@pytest.mark.parametrize("dilation", [None, 2])
def test_plain_residual_block(dilation):
    block = ResidualBlock(4, 4, norm=NORM, dilation=dilation)
    x, d = torch.randn(2, 4, 6, 6), dilation or 1
    h = functional.elu(block.normalize1(x, LEVEL))
    h = functional.conv2d(h, block.conv1.weight, block.conv1.bias, padding=d, dilation=d)
    h = functional.elu(block.normalize2(h, LEVEL))
    h = functional.conv2d(h, block.conv2.weight, block.conv2.bias, padding=d, dilation=d)
    torch.testing.assert_close(block(x, LEVEL), x + h)


def test_halving_block_pools_after_the_convolutions():
    block = ResidualBlock(4, 6, norm=NORM, down=True)
    x = torch.randn(2, 4, 6, 6)
    h = functional.elu(block.normalize1(x, LEVEL))
    h = block.conv1(h)
    assert h.shape == (2, 4, 6, 6)
    h = functional.elu(block.normalize2(h, LEVEL))
    full = functional.conv2d(h, block.conv2.conv.weight, block.conv2.conv.bias, padding=1)
    full = full + functional.conv2d(x, block.shortcut.conv.weight, block.shortcut.conv.bias)
    phases = [full[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    torch.testing.assert_close(block(x, LEVEL), sum(phases) / 4)


def test_dilated_down_block_keeps_the_size_and_has_a_dilated_shortcut():
    block = ResidualBlock(4, 6, norm=NORM, down=True, dilation=2)
    x = torch.randn(2, 4, 6, 6)
    assert block(x, LEVEL).shape == (2, 6, 6, 6)
    with torch.no_grad():
        block.conv2.weight.zero_()
        block.conv2.bias.zero_()
    expected = functional.conv2d(x, block.shortcut.weight, block.shortcut.bias, padding=2, dilation=2)
    torch.testing.assert_close(block(x, LEVEL), expected)


def test_residual_conv_unit_adds_each_block_to_its_input():
    unit = ResidualConvUnit(4, num_blocks=2, norm=NORM)
    x = y = torch.randn(2, 4, 5, 5)
    for block in ("1", "2"):
        h = y
        for stage in ("1", "2"):
            norm, conv = unit.get_submodule(f"{block}_{stage}_norm"), unit.get_submodule(f"{block}_{stage}_conv")
            h = functional.conv2d(functional.elu(norm(h, LEVEL)), conv.weight, padding=1)
        y = h + y
    torch.testing.assert_close(unit(x, LEVEL), y)


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


def test_chained_pooling_pools_the_first_stages_output():
    pooling = ChainedResidualPooling(4, norm=NORM, pool=average_pool)
    x = torch.randn(2, 4, 6, 6)
    start = functional.elu(x)
    first = pooling.convs[0](average_pool(pooling.norms[0](start, LEVEL)))
    second = pooling.convs[1](average_pool(pooling.norms[1](first, LEVEL)))
    torch.testing.assert_close(pooling(x, LEVEL), start + first + second)


def test_refine_block_takes_the_size_of_the_first_input():
    block = RefineBlock([4, 6], 5, norm=None, pool=max_pool, end=True)
    assert block([torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)], LEVEL).shape == (2, 5, 8, 8)
    assert block.output_convs.num_blocks == 3
    assert not any("norm" in name for name in block.state_dict())


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


def test_only_the_result_is_kept() -> None:
    kept: list[torch.Tensor] = []
    x = torch.randn(7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = elu(x)
        z = y * y
    z.sum().backward()
    assert {t.data_ptr() for t in kept} == {y.data_ptr()}
    assert torch.allclose(x.grad, 2 * y * torch.where(x > 0, 1.0, x.exp()))
