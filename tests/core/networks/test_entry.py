"""What every score network takes and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ncsn.core.networks.base import check_levels
from ncsn.core.networks.ddpmpp import DdpmppNetwork
from ncsn.core.networks.refinenet import NcsnNetwork, NcsnV2Network
from ncsn.core.networks.unet import UnetNetwork

SIGMAS = torch.logspace(0, -2, 5)
X = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LEVEL = torch.tensor([0, 3, 4])
PRECONDITIONED: dict[str, Any] = {
    "channels": 1,
    "image_size": 8,
    "sigmas": SIGMAS,
    "blocks_per_resolution": 1,
    "attention_sizes": (),
    "dropout": 0.0,
    "sigma_data": 0.25,
}


def make_network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module
    if kind == "ncsn":
        network = NcsnNetwork(4, channels=1, num_levels=5)
    elif kind == "ncsnv2":
        network = NcsnV2Network(4, channels=1, sigmas=SIGMAS)
    elif kind == "unet":
        network = UnetNetwork(widths=(8, 8), embedding_features=8, **PRECONDITIONED)
    else:
        network = DdpmppNetwork(base_width=8, multipliers=(1, 1), embedding_multiplier=2, **PRECONDITIONED)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("kind", ["ncsnv2", "unet", "ddpmpp"])
def test_level_and_its_sigma_give_the_same_score(kind: str) -> None:
    network = make_network(kind)
    by_level = network(X, LEVEL)
    assert torch.equal(network(X, sigma=SIGMAS[LEVEL]), by_level)
    assert torch.equal(network.score_at(X, SIGMAS[LEVEL]), by_level)
    assert not torch.equal(network(X, sigma=1.1 * SIGMAS[LEVEL]), by_level)


@pytest.mark.parametrize("kind", ["ncsn", "ncsnv2", "unet", "ddpmpp"])
@pytest.mark.parametrize("name", ["labels", "augmentation"])
def test_conditions_that_a_network_does_not_take_are_refused(kind: str, name: str) -> None:
    network = make_network(kind)
    with pytest.raises(ValueError, match=name):
        network(X, LEVEL, **{name: torch.zeros(3)})
    assert torch.equal(network(X, LEVEL, **{name: None}), network(X, LEVEL))


@pytest.mark.parametrize(
    ("kind", "level", "sigma"),
    [
        ("ncsn", None, None),
        ("ncsn", LEVEL, SIGMAS[LEVEL]),
        ("ncsn", None, SIGMAS[LEVEL]),
        ("unet", None, None),
        ("unet", LEVEL, SIGMAS[LEVEL]),
        ("unet", None, SIGMAS[:2]),
        ("unet", None, LEVEL),
    ],
)
def test_networks_take_one_noise_level_for_each_image(kind: str, level: Tensor | None, sigma: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"level|sigma"):
        make_network(kind)(X, level, sigma=sigma)


@pytest.mark.parametrize(
    ("level", "message"),
    [
        (torch.tensor([0, 3]), r"\b2\b.*\b0\b.*\b3\b"),
        (torch.tensor([-1, 0]), "-1"),
        (torch.tensor([0]), r"int64 .*\[2\]"),
        (torch.tensor([0.0, 1.0]), "float32"),
    ],
)
def test_levels_out_of_range_are_refused(level, message):
    with pytest.raises(ValueError, match=message):
        check_levels(level, batch=2, num_levels=3)
