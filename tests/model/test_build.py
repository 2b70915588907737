"""Each section of the config that names a class of `ncsn.core` has its settings and defaults."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from ncsn.config import choices, from_yaml, training
from ncsn.config.problems import fields_of
from ncsn.core.networks.ddpmpp import DdpmppNetwork
from ncsn.core.networks.refinenet import NcsnNetwork, NcsnV2Network
from ncsn.core.networks.unet import UnetNetwork
from ncsn.core.sliced import SlicedScoreMatching
from ncsn.core.training_noise import LognormalNoise
from ncsn.model import build

# What a network takes from other sections.
OTHERS = {"channels", "image_size", "sigmas", "num_classes", "augmentation"}
NCSN = {"channels", "num_levels"}


@pytest.mark.parametrize(
    ("section", "built", "others"),
    [
        (training.LognormalTraining, LognormalNoise, set()),
        (training.SsmLossConfig, SlicedScoreMatching, set()),
        (choices.NcsnNetworkConfig, NcsnNetwork, NCSN),
        (choices.NcsnV2NetworkConfig, NcsnV2Network, OTHERS),
        (choices.UnetNetworkConfig, UnetNetwork, OTHERS),
        (choices.DdpmppNetworkConfig, DdpmppNetwork, OTHERS | {"embedding_multiplier"}),
    ],
)
def test_a_section_has_the_settings_and_defaults_of_its_class(
    section: type[Any], built: type[Any], others: set[str]
) -> None:
    settings = {name: field for name, field in fields_of(section).items() if name != "kind"}
    parameters = inspect.signature(built).parameters
    assert set(settings) <= set(parameters) and set(parameters) - set(settings) <= others
    for name, field in settings.items():
        default = parameters[name].default
        assert field.is_required() or default in (inspect.Parameter.empty, field.default), name


RECTANGLES = """
name: rectangles
data: {source: image_folder, root: x, image_size: [48, 64], channels: 5}
network: {kind: unet, widths: [8]}
train: {num_images: 8, batch_size: 8, checkpoint_every_images: 8, report_every_images: 8}
sampling: {sampler: {kind: annealed_langevin}}
"""
ATTENDING = "blocks_per_resolution: 1, attention_sizes: [12]"


@pytest.mark.parametrize(
    "network",
    [
        "{kind: ncsn, num_features: 4}",
        "{kind: ncsnv2, num_features: 4, depth: deepest}",
        f"{{kind: unet, widths: [4, 4, 8], {ATTENDING}}}",
        f"{{kind: ddpmpp, base_width: 8, multipliers: [1, 1, 2], {ATTENDING}}}",
    ],
)
def test_every_network_takes_rectangles(network: str) -> None:
    config = from_yaml(RECTANGLES, overrides=[f"network={network}"])
    assert config.data.stored_shape == (48, 64, 5) and config.data.network_shape == (5, 48, 64)
    x, level = torch.rand(2, 5, 48, 64), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        score = build.network(config)(x, level)
    assert score.shape == x.shape and score.isfinite().all()
