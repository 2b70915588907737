"""Weights that go from one network to another: what the second computes then, and what is refused."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_networks import ddpmpp, shaken, unet
from torch import Tensor, nn

from ncsn.core.networks.refinenet import NcsnNetwork
from ncsn.core.networks.transfer import light_parameters, transfer

SOME = torch.tensor([0.02, 0.1, 0.5, 5.0], dtype=torch.float64)
SEEDS = itertools.count()  # each network has weights of its own
both = pytest.mark.parametrize("kind", [ddpmpp, unet])


def make(kind: Callable[..., nn.Module], **changes: Any) -> nn.Module:
    return shaken(kind(**changes), seed=next(SEEDS)).double().eval()


def moved(source: nn.Module, target: nn.Module, **options: Any) -> tuple[nn.Module, list[str]]:
    weights, changes = transfer(dict(source.named_parameters()), target, **options)
    target.load_state_dict(weights, strict=False)
    return target, changes


def scores(network: nn.Module, **conditions: Tensor) -> Tensor:
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    with torch.inference_mode():
        score: Tensor = network(x, sigma=SOME, **conditions)
    return score


@both
def test_conditions_come_and_go_without_an_effect(kind: Callable[..., nn.Module]) -> None:
    source = make(kind)
    target, changes = moved(source, make(kind, num_classes=4, augmentation=True))
    assert len(changes) == 2
    given = {"labels": torch.arange(4), "augmentation": torch.rand(4, 9)}
    torch.testing.assert_close(scores(target, **given), scores(source), rtol=1e-6, atol=1e-6)
    source = make(kind, num_classes=10, augmentation=True)
    back, changes = moved(source, make(kind))
    assert len(changes) == 2
    none = torch.full((4,), -1)
    torch.testing.assert_close(scores(back), scores(source, labels=none), rtol=1e-6, atol=1e-6)


@both
def test_classes_keep_what_they_mean_and_new_ones_are_the_mean(kind: Callable[..., nn.Module]) -> None:
    source = make(kind, num_classes=3)
    assert moved(source, make(kind, num_classes=3))[1] == []
    target, changes = moved(source, make(kind, num_classes=4), classes=[2, None, 0, 1])
    assert len(changes) == 1
    labels, before = torch.tensor([0, 2, 3, -1]), torch.tensor([2, 0, 1, -1])
    torch.testing.assert_close(scores(target, labels=labels), scores(source, labels=before), rtol=1e-6, atol=1e-6)
    terms = {n: p for n, p in target.named_parameters() if n.endswith("map_label.weight")}.popitem()[1].detach()
    torch.testing.assert_close(terms[:, 1], terms[:, [0, 2, 3]].mean(dim=1))
    fewer, _ = moved(source, make(kind, num_classes=2))
    both = torch.tensor([0, 1, 0, 1])
    torch.testing.assert_close(scores(fewer, labels=both), scores(source, labels=both), rtol=1e-6, atol=1e-6)


@both
def test_gray_images_look_the_same_to_a_network_for_rgb(kind: Callable[..., nn.Module]) -> None:
    source = make(kind)
    color, changes = moved(source, make(kind, channels=3))
    assert len(changes) == 1
    x = torch.rand(4, 1, 8, 8).double()
    with torch.inference_mode():
        gray = source(x, sigma=SOME)
        torch.testing.assert_close(color(x.expand(4, 3, 8, 8), sigma=SOME), gray.expand(4, 3, 8, 8))
    again, _ = moved(color, make(kind))
    torch.testing.assert_close(scores(again), scores(source))


def test_other_networks_are_refused_with_what_differs() -> None:
    weights = dict(make(ddpmpp).named_parameters())
    with pytest.raises(ValueError, match=r"\(dec\.4x4_block0\S* \[.*\] .*\["):
        transfer(weights, make(ddpmpp, multipliers=(1, 3)))
    with pytest.raises(ValueError, match=r"\(down\.0\.0.*\(dec\.4x4_block0"):
        transfer(weights, make(unet))
    with pytest.raises(ValueError, match=r"refine1\.adapt_convs\S* \[3, 24\] .*\[4, 24\]"):
        transfer(
            dict(NcsnNetwork(4, channels=1, num_levels=3).named_parameters()), NcsnNetwork(4, channels=1, num_levels=4)
        )


def test_a_light_training_leaves_the_convolutions_outside_of_attention() -> None:
    network = ddpmpp(augmentation=True)
    light = light_parameters(network)
    fixed = {name for name, _ in network.named_parameters()} - light
    assert fixed and all(name.endswith("weight") and ("conv" in name or "shortcut" in name) for name in fixed)
    assert not [name for name in light if ".conv" in name and name.endswith("weight")]
