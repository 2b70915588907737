"""Every sampler of the config runs on a trained network, image by image the same in any batch."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from refused import refused

from ncsn.config import Config, from_yaml
from ncsn.core.images import fit_moments
from ncsn.core.samplers.base import Sampler
from ncsn.core.samplers.ode import KarrasHeun
from ncsn.core.samplers.stochastic import AnnealedLangevin, Langevin
from ncsn.errors import ConfigError
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.generate import complete, evaluations_per_image, generate, interpolate, with_evaluations

TEXT = """
name: tiny
data: {source: sklearn_digits, image_size: 8, channels: 1}
noise: {num_levels: 6, sigma_1: 1.0, sigma_L: 0.05}
network: {kind: unet, widths: [8, 8], blocks_per_resolution: 1, embedding_features: 8}
train: {batch_size: 8, num_images: 16, checkpoint_every_images: 8, report_every_images: 8}
sampling: {num_images: 4, sampler: {kind: annealed_langevin, steps_per_level: 3, epsilon: 2.0e-4}}
evaluation: {num_splits: 2}
"""
SAMPLERS = {
    "annealed_langevin": ({"steps_per_level": 3, "epsilon": 2e-4}, 19),
    "langevin": ({"num_steps": 7, "step_size": 1e-4}, 8),
    "consistent_annealed": ({"epsilon": 2e-3, "denoise": True}, 7),
    "predictor_corrector": ({"predictor": "ancestral", "corrector_steps": 1}, 12),
    "probability_flow": ({"method": "heun"}, 11),
    "karras_heun": ({"num_steps": 5, "churn": 2.0, "churn_min": 0.06, "churn_noise": 1.003}, 9),
    "dpm_solver": ({"num_steps": 7, "eta": 0.5}, 7),
    "unipc": ({"num_levels": 6, "spacing": "geometric"}, 6),
}


def config_with(kind: str) -> Config:
    tree = yaml.safe_load(TEXT)
    tree["sampling"]["sampler"] = {"kind": kind, **SAMPLERS[kind][0]}
    return from_yaml(yaml.safe_dump(tree))


def sampler_with(kind: str) -> Sampler:
    return build.sampler(config_with(kind).sampling.sampler)


def trained(config: Config) -> TrainedNetwork:
    """A network that has learned nothing but gives a score, and moments of noise."""
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    network = build.network(config).eval().requires_grad_(False)
    return TrainedNetwork(config=config, network=network, moments=fit_moments(images))


@pytest.mark.parametrize("kind", SAMPLERS)
def test_each_sampler_of_the_config_makes_images(kind: str) -> None:
    config = config_with(kind)
    images = generate(trained(config), sampling=config.sampling, first=0, count=4)
    assert images.shape == (4, 8, 8, 1) and images.dtype == np.uint8
    assert images.std() > 0
    assert not np.array_equal(images[0], images[1])


@pytest.mark.parametrize("kind", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(kind: str) -> None:
    config = config_with(kind)
    network = trained(config)
    whole = generate(network, sampling=config.sampling, first=0, count=5)
    alone = generate(network, sampling=config.sampling, first=3, count=1)
    assert np.abs(whole[3].astype(int) - alone[0].astype(int)).max() <= 1


@pytest.mark.parametrize("kind", ["annealed_langevin", "karras_heun"])
def test_bfloat16_is_the_networks_alone(kind: str) -> None:
    config = config_with(kind)
    network = trained(config)
    torch.nn.init.normal_(network.network.output.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    convolved: set[torch.dtype] = set()
    network.network.input.register_forward_hook(lambda module, given, made: convolved.add(made.dtype))  # type: ignore[operator]
    states: set[torch.dtype] = set()
    halved = generate(
        network,
        sampling=config.sampling.model_copy(update={"precision": "bfloat16"}),
        first=0,
        count=4,
        on_level=lambda _, x: states.add(x.dtype),
    )
    assert (convolved, states) == ({torch.bfloat16}, {torch.float32})
    exact = generate(network, sampling=config.sampling, first=0, count=4)
    difference = np.abs(halved.astype(int) - exact.astype(int))
    assert difference.max() > 0 and difference.mean() < 2


def test_completing_keeps_what_is_known_and_depends_on_no_batch() -> None:
    config = config_with("annealed_langevin")
    network = trained(config)
    given = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    known = np.eye(8, dtype=bool)
    whole = complete(network, given, known, sampling=config.sampling)
    assert (whole[:, known] == given[:, known]).all()
    assert (whole[:, ~known] != given[:, ~known]).any()
    alone = complete(network, given[2:], np.stack([known]), sampling=config.sampling, first=2)
    assert np.abs(whole[2].astype(int) - alone[0].astype(int)).max() <= 1


def test_completing_refuses_what_does_not_fit() -> None:
    config = config_with("annealed_langevin")
    images, known = np.zeros((1, 8, 8, 1), np.uint8), np.ones((8, 8), bool)
    with refused("images") as caught:
        complete(trained(config), images.repeat(3, axis=3), known, sampling=config.sampling)
    assert "[8, 8, 3]" in caught.value.problems[0].reason
    with refused("mask"):
        complete(trained(config), images, known[:4], sampling=config.sampling)
    with refused("sampling.sampler.kind"):
        complete(trained(config), images, known, sampling=config_with("langevin").sampling)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_an_interpolation_runs_from_one_image_to_the_other(kind: str) -> None:
    config = config_with(kind)
    network = trained(config)
    path = interpolate(network, sampling=config.sampling, first=2, second=5, count=4)
    assert path.shape == (4, 8, 8, 1)
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(path, 2))
    assert np.array_equal(path, interpolate(network, sampling=config.sampling, first=2, second=5, count=4))
    shared_start = sampler_with(kind).uniform_start
    for end, index in ((0, 2), (-1, 5))[: 1 if shared_start else 2]:
        image = generate(network, sampling=config.sampling, first=index, count=1)[0]
        assert np.abs(path[end].astype(int) - image.astype(int)).max() <= 1


@pytest.mark.parametrize(("kind", "nfe"), [(kind, nfe) for kind, (_, nfe) in SAMPLERS.items()])
def test_nfe_is_what_the_network_is_asked(kind: str, nfe: int) -> None:
    config = config_with(kind)
    network = trained(config)
    calls = 0
    inner = network.network.score_at

    def counted(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return inner(x, sigma)

    network.network.score_at = counted  # type: ignore[assignment]
    network.network.forward = lambda x, level: counted(x, network.network.sigmas[level])  # type: ignore[assignment,index]
    generate(network, sampling=config.sampling, first=0, count=1)
    assert calls == nfe == evaluations_per_image(config)


def test_stages_begin_with_the_start() -> None:
    config = config_with("annealed_langevin")
    stages: list[int] = []
    generate(trained(config), sampling=config.sampling, first=0, count=1, on_level=lambda k, _: stages.append(k))
    assert stages == list(range(7))


@pytest.mark.parametrize(
    ("kind", "nfe", "field", "value"),
    [
        ("annealed_langevin", 31, "steps_per_level", 5),
        ("langevin", 4, "num_steps", 3),
        ("probability_flow", 5, "num_levels", 3),
        ("karras_heun", 35, "num_steps", 18),
        ("dpm_solver", 18, "num_steps", 18),
        ("unipc", 4, "num_levels", 4),
    ],
)
def test_the_length_of_a_chain_can_be_chosen(kind: str, nfe: int, field: str, value: int) -> None:
    changed = sampler_with(kind).with_evaluations(nfe, num_levels=6)
    assert getattr(changed, field) == value
    assert changed.num_evaluations(6) == nfe


@pytest.mark.parametrize(
    ("kind", "nfe", "hint"),
    [
        ("annealed_langevin", 20, "use 19 or 25"),
        ("probability_flow", 40, "use 11"),
        ("predictor_corrector", 3, ""),
        ("unipc", 9, "use 6"),
        ("karras_heun", 40_001, "num_steps = 20001: input should be less than or equal to 10000"),
    ],
)
def test_lengths_out_of_reach_name_the_nearest(kind: str, nfe: int, hint: str) -> None:
    with refused("nfe") as caught:
        with_evaluations(config_with(kind).sampling.sampler, nfe, num_levels=6)
    assert hint in str(caught.value)


def test_a_sampler_for_continuous_networks_refuses_the_2019_network() -> None:
    tree = yaml.safe_load(TEXT)
    tree["network"] = {"kind": "ncsn", "num_features": 4}
    tree["sampling"]["sampler"] = {"kind": "karras_heun", "num_steps": 3}
    with refused("sampling.sampler.kind", error=ConfigError):
        from_yaml(yaml.safe_dump(tree))


@pytest.mark.parametrize("kind", ["dpm_solver", "unipc"])
def test_multistep_samplers_visit_the_levels_of_the_2019_network(kind: str) -> None:
    tree = yaml.safe_load(TEXT)
    tree["network"] = {"kind": "ncsn", "num_features": 4}
    tree["sampling"]["sampler"] = {"kind": kind, "num_levels": 4, "spacing": "geometric"}
    config = from_yaml(yaml.safe_dump(tree))
    images = generate(trained(config), sampling=config.sampling, first=0, count=2)
    assert images.std() > 0 and evaluations_per_image(config) == 4


@pytest.mark.parametrize("depth", ["standard", "deeper", "deepest"])
def test_the_2020_network_is_built_in_each_depth(depth: str) -> None:
    tree = yaml.safe_load(TEXT)
    tree["network"] = {"kind": "ncsnv2", "num_features": 4, "depth": depth}
    tree["data"]["image_size"] = 16
    config = from_yaml(yaml.safe_dump(tree))
    network = build.network(config)
    x = torch.rand(2, 1, 16, 16)
    score = network(x, torch.tensor([0, 5]))
    assert score.shape == x.shape
    same = network(x[:1].expand(2, -1, -1, -1), torch.tensor([0, 5])) * build.sigmas(config)[[0, 5], None, None, None]
    assert torch.allclose(same[0], same[1], rtol=1e-5, atol=1e-6)


def test_a_chain_is_cut_to_the_evaluations_that_it_may_take() -> None:
    annealed = AnnealedLangevin(epsilon=2e-5, steps_per_level=50)
    assert annealed.at_most(21, num_levels=4) == replace(annealed, steps_per_level=5)
    assert annealed.at_most(1000, num_levels=4) == annealed
    assert annealed.at_most(3, num_levels=4) is None
    shorter = Langevin(level=-1, step_size=1e-4, num_steps=500, denoise=True).at_most(9, num_levels=4)
    assert shorter is not None and shorter.num_evaluations(4) == 9
    assert KarrasHeun(num_steps=18).at_most(10, num_levels=4) == KarrasHeun(num_steps=5)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_sampler_and_its_section_of_the_config_are_one(kind: str) -> None:
    section = config_with(kind).sampling.sampler
    assert build.sampler_section(build.sampler(section)) == section


@pytest.mark.parametrize(
    ("kind", "wanted", "nfe"),
    [
        ("annealed_langevin", 21, 19),
        ("annealed_langevin", 23, 25),
        ("annealed_langevin", 1, 7),
        ("probability_flow", 1000, 11),
        ("karras_heun", 36, 35),
        ("dpm_solver", 1, 2),
        ("predictor_corrector", 500, 12),
    ],
)
def test_the_nearest_chain(kind: str, wanted: int, nfe: int) -> None:
    assert sampler_with(kind).nearest(wanted, num_levels=6).num_evaluations(6) == nfe


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("fewer", [False, True])
def test_each_stage_after_the_start_has_its_sigma(kind: str, fewer: bool) -> None:
    config = config_with(kind)
    sampling = config.sampling
    if fewer and kind in ("predictor_corrector", "probability_flow", "unipc"):
        sampling = sampling.model_copy(update={"sampler": sampling.sampler.model_copy(update={"num_levels": 3})})
    elif fewer and kind == "consistent_annealed":
        finer = sampling.sampler.model_copy(update={"refine": 2, "epsilon": 1.5e-3})
        sampling = sampling.model_copy(update={"sampler": finer})
    stages: list[int] = []
    generate(trained(config), sampling=sampling, first=0, count=1, on_level=lambda stage, _: stages.append(stage))
    sigmas = build.sampler(sampling.sampler).visited(build.sigmas(config))
    assert len(sigmas) == len(stages) - 1
    assert sigmas == sorted(sigmas, reverse=True)
    assert sigmas[-1] == pytest.approx(0.05)
