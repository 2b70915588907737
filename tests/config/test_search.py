"""The search section: spaces, rungs, variants and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from refused import refused

from ncsn.config import Config, ConfigError, changed_settings, from_yaml
from ncsn.config.search import rungs, searched_space, swept, variant

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = (CONFIGS / "digits.yaml").read_text()


def digits(*overrides: str) -> Config:
    return from_yaml(DIGITS, overrides=list(overrides))


def space(text: str) -> str:
    return f"search={{space: {{{text}}}}}"


def test_a_space_that_names_nothing_is_the_noise_around_the_config() -> None:
    found = searched_space(digits("search={}"))
    ends = {path: (domain.low, domain.high) for path, domain in found.items()}  # type: ignore[union-attr]
    assert ends == {"noise.sigma_1": (0.333333, 3.0), "noise.sigma_L": (0.01, 0.09)}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("noise.sigma1: {kind: log, low: 0.1, high: 1}", ".noise.sigma1"),
        ("noise: {kind: log, low: 0.1, high: 1}", ".noise"),
        ("network.kind: {kind: choice, values: [unet]}", ".network.kind"),
        ("train.num_images: {kind: log, low: 1e3, high: 1e5}", ".train.num_images"),
        ("train.init_from: {kind: choice, values: [/etc/x, /etc/y]}", ".train.init_from"),
        ("sampling.sampler.epsilon: {kind: log, low: 1e-6, high: 1e-4}", ".sampling.sampler.epsilon"),
        ("noise.sigma_1: {kind: log, low: 0.02, high: 2}", ""),
        ("noise.sigma_L: {kind: log, low: 0.01, high: 1.0e+300}", ""),
        ("loss.anneal_power: {kind: choice, values: [2, much]}", ""),
        ("noise.sigma_1: {kind: log, low: 2, high: 1}", ".noise.sigma_1.low"),
        ("loss.anneal_power: {kind: log, low: 0, high: 2}", ".loss.anneal_power.low"),
        ("noise.sigma_1: {low: 1, high: 2}", ".noise.sigma_1.kind"),
        # Each is fine with the config's value of the other.
        ("noise.sigma_1: {kind: log, low: 0.05, high: 2}, noise.sigma_L: {kind: log, low: 0.01, high: 0.1}", ""),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(text: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        digits(space(text))
    assert f"search.space{key}" in caught.value.keys


def test_epsilons_need_a_sampler_that_has_one() -> None:
    with refused("search.epsilons", error=ConfigError):
        digits("search.epsilons=[0.1]", "sampling.sampler={kind: dpm_solver}")


@pytest.mark.parametrize(
    ("images", "factor", "expected"),
    [(140_000, 4, [8750, 35000, 140_000]), (70_000, 3, [7777, 23333, 70_000]), (128, 100, [1, 128])],
)
def test_rungs_end_with_training(images: int, factor: int, expected: list[int]) -> None:
    assert rungs(digits(f"train.num_images={images}", f"search.reduction_factor={factor}")) == expected


def test_a_variant_is_the_config_with_other_values() -> None:
    config = digits("search={}")
    changed = variant(config, {"noise.sigma_1": 2.0, "network.widths": [8, 16]})
    different = {"noise.sigma_1": (1.0, 2.0), "network.widths": ([32, 64], [8, 16])}
    assert changed_settings(config, changed) == different and changed.sampling == config.sampling
    assert changed.search is None
    less = variant(config, {"noise.sigma_L": 0.06})
    assert less.sampling.sampler.epsilon == 4 * 9e-5  # type: ignore[union-attr] # its ratio to sigma_L^2 stays
    with refused("noise.sigma_1", error=ConfigError):
        variant(config, {"noise.sigma_1": -1.0})


def epsilons(config: Config, sigma_L: float, *, with_own: bool = False) -> list[float]:
    chosen = variant(config, {"noise.sigma_L": sigma_L})
    return [each.sampling.sampler.epsilon for each in swept(config, chosen, with_own=with_own)]  # type: ignore[union-attr]


def test_epsilons_are_swept_in_units_of_the_least_noise() -> None:
    config = digits("search.epsilons=[0.2, 0.05]")
    assert epsilons(config, 0.02) == pytest.approx([0.05 * 4e-4, 0.2 * 4e-4])
    assert epsilons(config, 0.03, with_own=True) == pytest.approx([0.05 * 9e-4, 9e-5, 0.2 * 9e-4])
    assert epsilons(digits("search={}"), 0.03) == pytest.approx([4.5e-5, 9e-5, 1.8e-4])
    config = digits("search={}", "sampling.sampler={kind: dpm_solver}")  # which has none
    assert [each.sampling for each in swept(config, variant(config, {}), with_own=True)] == [config.sampling]


def test_levels_that_the_images_will_choose_are_looked_at_then() -> None:
    text = DIGITS.replace("  sigma_1: 1.0\n", "  kind: auto\n").replace("  num_levels: 20\n", "")
    config = from_yaml(text, overrides=["search.num_trials=3"])
    assert config.noise.kind == "auto" and config.search is not None
