"""Each section of the config with a `kind` has its class, with the same settings and defaults."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import pytest

from ncsn.config import choices, noise
from ncsn.config.choices import Section
from ncsn.config.problems import section_models
from ncsn.config.schema import SamplingConfig
from ncsn.core.losses import SlicedScoreMatching
from ncsn.core.networks.ddpmpp import DdpmppNetwork
from ncsn.core.networks.refinenet import NcsnNetwork, NcsnV2Network
from ncsn.core.networks.unet import UnetNetwork
from ncsn.core.samplers.ode import KarrasHeun
from ncsn.core.training_noise import LognormalNoise
from ncsn.model import build

SAMPLERS = {
    get_args(section.model_fields["kind"].annotation)[0]: section
    for section in section_models(SamplingConfig, "sampler")
}
# What a network takes from other sections.
OTHERS = {"channels", "image_size", "sigmas", "rescale", "num_classes", "augmentation"}
NCSN = {"channels", "num_levels", "rescale"}


def test_every_sampler_of_the_config_can_be_built() -> None:
    assert set(build._SAMPLERS) == set(SAMPLERS)


def test_the_samplers_that_restore_images_say_so() -> None:
    restoring = {kind for kind, sampler in build._SAMPLERS.items() if sampler.descends}
    assert restoring == {"probability_flow", "karras_heun", "dpm_solver", "unipc"}


@pytest.mark.parametrize(
    ("section", "built", "others"),
    [
        *((section, build._SAMPLERS.get(kind), set()) for kind, section in SAMPLERS.items()),
        (noise.LognormalTraining, LognormalNoise, set()),
        (noise.SsmLossConfig, SlicedScoreMatching, set()),
        (choices.NcsnNetworkConfig, NcsnNetwork, NCSN),
        (choices.NcsnV2NetworkConfig, NcsnV2Network, OTHERS),
        (choices.UnetNetworkConfig, UnetNetwork, OTHERS),
        (choices.DdpmppNetworkConfig, DdpmppNetwork, OTHERS),
    ],
)
def test_a_section_has_the_settings_and_defaults_of_its_class(
    section: type[Section], built: type[Any], others: set[str]
) -> None:
    settings = {name: field for name, field in section.model_fields.items() if name != "kind"}
    parameters = inspect.signature(built).parameters
    assert set(settings) == set(parameters) - others
    for name, field in settings.items():
        default = parameters[name].default
        assert field.is_required() or default in (inspect.Parameter.empty, field.default), name


def test_the_section_of_a_sampler_builds_it_again() -> None:
    sampler = KarrasHeun()
    assert build.sampler(build.sampler_section(sampler)) == sampler
