"""The shipped configs of the papers have their networks, chain lengths and steps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ncsn.config import Config, from_yaml
from ncsn.core.noise_schedule import best_epsilon
from ncsn.model import build
from ncsn.model.generate import evaluations_per_image

CONFIGS = Path(__file__).parents[2] / "configs"


def shipped(name: str) -> Config:
    return from_yaml((CONFIGS / f"{name}.yaml").read_text())


@pytest.mark.parametrize(
    ("name", "parameters", "nfe"),
    [
        ("mnist", 7_638_657, 1000),
        ("cifar10_ncsn", 30_117_635, 1000),
        ("cifar10_ncsnv2", 29_694_083, 1161),
        ("celeba", 29_694_083, 2501),
    ],
)
def test_networks_chains_and_steps_are_the_papers(name: str, parameters: int, nfe: int) -> None:
    config = shipped(name)
    noise, sampler = config.noise, config.sampling.sampler
    assert sampler.kind == "annealed_langevin"
    ratio = (noise.sigma_1 / noise.sigma_L) ** (1 / (noise.num_levels - 1))
    technique_4 = best_epsilon(sigma_L=noise.sigma_L, ratio=ratio, steps_per_level=sampler.steps_per_level)
    assert sampler.epsilon == pytest.approx(technique_4 if config.network.kind == "ncsnv2" else 2e-5, rel=0.02)
    assert sum(parameter.numel() for parameter in build.network(config).parameters()) == parameters
    assert evaluations_per_image(config) == nfe


@pytest.mark.parametrize("name", ["digits", "fashion", "cifar10"])
def test_a_two_step_recipe_tunes_the_network_of_the_run_that_it_names(name: str) -> None:
    config = shipped(f"{name}_two_step")
    teacher = shipped(str(config.train.init_from).replace("-", "_"))
    assert config.network.model_copy(update={"dropout": 0.0}) == teacher.network.model_copy(update={"dropout": 0.0})
    assert config.data == teacher.data.model_copy(update={"augmentation": None})
    assert (config.noise.sigma_1, config.evaluation) == (teacher.noise.sigma_1, teacher.evaluation)
    assert config.registered_model == f"ncsn-{name}-two-step" and evaluations_per_image(config) == 2
    assert config.loss.kind == "consistency"
    if teacher.sampling.guidance is not None:
        assert getattr(config.loss, "guidance", None) == teacher.sampling.guidance
    # -1.1 and 2 for pixels in [-1, 1] whose deviation is 0.5, there as here.
    training = config.noise.training
    assert training.kind == "lognormal"
    unit = getattr(config.network, "sigma_data", 0) / 0.5
    assert training.mean == pytest.approx(math.log(unit) - 1.1, abs=0.01) and training.std == 2.0
