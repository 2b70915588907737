"""The shipped configs of the papers have their networks, chain lengths and steps."""

from __future__ import annotations

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
def test_networks_and_chains_are_the_papers(name: str, parameters: int, nfe: int) -> None:
    config = shipped(name)
    assert sum(parameter.numel() for parameter in build.network(config).parameters()) == parameters
    assert evaluations_per_image(config) == nfe


@pytest.mark.parametrize("name", ["cifar10_ncsnv2", "celeba"])
def test_epsilon_of_ncsnv2_is_that_of_technique_4(name: str) -> None:
    config = shipped(name)
    noise, sampler = config.noise, config.sampling.sampler
    assert sampler.kind == "annealed_langevin"
    ratio = (noise.sigma_1 / noise.sigma_L) ** (1 / (noise.num_levels - 1))
    chosen = best_epsilon(sigma_L=noise.sigma_L, ratio=ratio, steps_per_level=sampler.steps_per_level)
    assert sampler.epsilon == pytest.approx(chosen, rel=0.02)
