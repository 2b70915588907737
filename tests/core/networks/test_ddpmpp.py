"""The DDPM++ network: sizes and costs to the digit, and its block against the formulas."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_networks import ddpmpp
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from ncsn.core.networks.ddpmpp import Block, Place, SelfAttention

CIFAR10 = {
    "channels": 3,
    "image_size": 32,
    "base_width": 128,
    "multipliers": (2, 2, 2),
    "blocks_per_resolution": 4,
    "attention_sizes": (16,),
    "augmentation": True,
}


@pytest.mark.parametrize(
    ("settings", "tensors", "parameters", "flop"),
    [
        (CIFAR10, 417, 55_733_891, 42_380_429_568),
        (CIFAR10 | {"num_classes": 10}, 419, 55_735_299, None),
        (CIFAR10 | {"image_size": 64, "multipliers": (1, 2, 2, 2)}, None, 61_805_571, 83_722_897_664),
    ],
)
def test_sizes_and_costs(settings: dict[str, Any], tensors: int | None, parameters: int, flop: int | None) -> None:
    with torch.device("meta"):
        network = ddpmpp(**settings).to("meta")
        x, level = torch.zeros(1, 3, settings["image_size"], settings["image_size"]), torch.zeros(1, dtype=torch.int64)
    found = [parameter.numel() for parameter in network.parameters()]
    assert sum(found) == parameters and (tensors is None or len(found) == tensors)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, level)
    assert flop is None or counter.get_total_flops() == flop


def test_names_sizes_and_skips_are_those_of_the_published_network() -> None:
    with torch.device("meta"):
        network = ddpmpp(**CIFAR10)
    sizes = {
        f"{part}.{name}": sum(parameter.numel() for parameter in module.parameters())
        for part in ("enc", "dec")
        for name, module in getattr(network, part).items()
    }
    plain, attending, narrowed = 1_312_512, 1_576_192, 2_034_176

    def blocks(part: str, size: int, counts: Sequence[int]) -> dict[str, int]:
        return {f"{part}.{size}x{size}_block{number}": count for number, count in enumerate(counts)}

    expected = {"enc.32x32_conv": 3_584} | blocks("enc", 32, [1_050_368, plain, plain, plain])
    expected |= {"enc.16x16_down": 1_378_304} | blocks("enc", 16, [attending] * 4)
    expected |= {"enc.8x8_down": 1_378_304} | blocks("enc", 8, [plain] * 4)
    expected |= {"dec.8x8_in0": attending, "dec.8x8_in1": plain} | blocks("dec", 8, [narrowed] * 5)
    expected |= {"dec.16x16_up": 1_378_304} | blocks("dec", 16, [*[narrowed] * 4, 2_297_856])
    expected |= {"dec.32x32_up": 1_378_304} | blocks("dec", 32, [*[narrowed] * 4, 1_706_240])
    expected |= {"dec.32x32_aux_norm": 512, "dec.32x32_aux_conv": 6_915}
    assert list(sizes.items()) == list(expected.items())
    mapping = [network.map_layer0, network.map_layer1, network.condition_terms]
    assert [sum(p.numel() for p in part.parameters()) for part in mapping] == [66_048, 262_656, 1_152]
    joined = [block.norm0.num_channels for name, block in network.dec.items() if "block" in name]
    assert joined == [512] * 14 + [384]


def plain_block(block: Block, x: Tensor, e: Tensor) -> Tensor:
    """The formulas, by plain functions."""

    def resampled(maps: Tensor) -> Tensor:
        if block.resample == "down":
            return functional.avg_pool2d(maps, 2)
        return maps.repeat_interleave(2, 2).repeat_interleave(2, 3) if block.resample == "up" else maps

    def norm(layer: nn.GroupNorm, maps: Tensor) -> Tensor:
        assert layer.num_groups == min(32, maps.shape[1] // 4)
        return functional.group_norm(maps, layer.num_groups, layer.weight, layer.bias, 1e-6)

    def conv(layer: nn.Conv2d, maps: Tensor) -> Tensor:
        return functional.conv2d(maps, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)

    h = conv(block.conv0, resampled(functional.silu(norm(block.norm0, x))))
    h = h + (e @ block.affine.weight.T + block.affine.bias)[:, :, None, None]
    h = conv(block.conv1, functional.silu(norm(block.norm1, h)))
    shortcut = resampled(x)
    y = (h + (conv(block.shortcut, shortcut) if isinstance(block.shortcut, nn.Conv2d) else shortcut)) / math.sqrt(2)
    if isinstance(block.attention, SelfAttention):
        q, k, v = conv(block.attention.query_key_value, norm(block.attention.norm, y)).flatten(2).chunk(3, dim=1)
        weights = (q.transpose(1, 2) @ k / math.sqrt(len(q[0]))).softmax(dim=2)
        attended = (v @ weights.transpose(1, 2)).view_as(y)
        y = (y + conv(block.attention.output, attended)) / math.sqrt(2)
    return y


@pytest.mark.parametrize(
    "place",
    [Place("", 16), Place("", 24, attention=True), Place("", 16, resample="down"), Place("", 16, resample="up")],
)
def test_a_block_is_that_of_the_formulas(place: Place) -> None:
    torch.manual_seed(0)
    block = Block(16, place, embedding_features=12, dropout=0.0).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, e = torch.randn(3, 16, 8, 8, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(block(x, e, None), plain_block(block, x, e))
