"""Every sampler of the config runs on a trained network, image by image the same in any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml

from ncsn.config import Config, from_yaml
from ncsn.core.images import fit_moments
from ncsn.core.samplers.chain import visited
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.generate import Strip, evaluations_per_image, generate

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
    "karras_heun": ({"num_steps": 5, "churn": 2.0, "churn_noise": 1.003}, 9),
    "dpm_solver": ({"num_steps": 7, "eta": 0.5}, 7),
}


def config_with(kind: str) -> Config:
    tree = yaml.safe_load(TEXT)
    tree["sampling"]["sampler"] = {"kind": kind, **SAMPLERS[kind][0]}
    return from_yaml(yaml.safe_dump(tree))


def trained(config: Config) -> TrainedNetwork:
    """A network that has learned nothing but gives a score, and moments of noise."""
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    network = build.network(config).eval().requires_grad_(False)
    return TrainedNetwork(config=config, network=network, moments=fit_moments(images))


@pytest.mark.parametrize(("kind", "evaluations"), [(kind, nfe) for kind, (_, nfe) in SAMPLERS.items()])
def test_each_sampler_makes_images_that_do_not_depend_on_their_batch(kind: str, evaluations: int) -> None:
    config, stages = config_with(kind), list[int]()
    network = trained(config)
    assert evaluations_per_image(config) == evaluations
    whole = generate(
        network, sampling=config.sampling, first=0, count=5, on_level=lambda stage, _: stages.append(stage)
    )
    assert stages == list(range(len(visited(config.sampling.sampler, build.sigmas(config))) + 1))
    assert whole.shape == (5, 8, 8, 1) and whole.dtype == np.uint8
    assert whole.std() > 0 and not np.array_equal(whole[0], whole[1])
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


@pytest.mark.parametrize(
    ("count", "kept"), [(1, [0]), (3, [0, 1, 2]), (6, [0, 2, 4, 5]), (8, [0, 2, 4, 6, 7]), (10, [0, 4, 8, 9])]
)
def test_the_strip_spreads_its_stages_evenly_and_ends_with_the_finished_images(
    count: int, kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ncsn.model.generate.STRIP_STAGES", 5)
    monkeypatch.setattr("ncsn.model.generate.level_images", lambda x, *_: x)
    config = from_yaml(TEXT)
    strip = Strip(config.sampling, config)
    for number in range(count):
        strip(number, np.full((1, 2, 2, 1), number, np.uint8))
    assert strip.frames(np.full((1, 2, 2, 1), 99, np.uint8))[:, 0, 0, 0, 0].tolist() == [*kept[:-1], 99]
