"""Each section of the config that names a class of `ncsn.core` has its settings and defaults."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from ncsn.config import choices, training
from ncsn.config.problems import fields_of
from ncsn.core.losses import SlicedScoreMatching
from ncsn.core.networks.ddpmpp import DdpmppNetwork
from ncsn.core.networks.refinenet import NcsnNetwork, NcsnV2Network
from ncsn.core.networks.unet import UnetNetwork
from ncsn.core.training_noise import LognormalNoise

# What a network takes from other sections.
OTHERS = {"channels", "image_size", "sigmas", "num_classes", "augmentation"}
NCSN = {"channels", "num_levels"}


@pytest.mark.parametrize(
    ("section", "built", "others"),
    [
        (training.LognormalTraining, LognormalNoise, set()),
        (training.SsmLossConfig, SlicedScoreMatching, {"num_projections"}),
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
