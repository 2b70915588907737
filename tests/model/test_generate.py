"""Images of a trained network: by every sampler, of given classes, guided, and from a registered model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refused import refused
from served import TEXT, trained_by

from ncsn.config import Config, from_yaml
from ncsn.core.samplers.chain import visited
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork, load_checkpoint, save_network, weights_digest
from ncsn.model.classes import Classes, require_label
from ncsn.model.generate import Strip, evaluations_per_image, generate, image_labels, sampling_facts, with_precision

NOISE = "noise={num_levels: 6, sigma_1: 2.0, sigma_L: 0.05}"
FREE = "sampling.guidance={kind: classifier_free, weight: 3.0}"
HEUN = "sampling.sampler={kind: karras_heun, num_steps: 5, churn: 2}"
LANGEVIN = "sampling.sampler={kind: annealed_langevin, steps_per_level: 2}"


def config_with(*overrides: str) -> Config:
    return from_yaml(TEXT, overrides=[NOISE, *overrides])


def network_of(*overrides: str, seed: int = 0) -> TrainedNetwork:
    return trained_by(seed, NOISE, *overrides)


def images(trained: TrainedNetwork, *overrides: str, first: int = 0, count: int = 4) -> np.ndarray:
    return generate(trained, sampling=config_with(*overrides).sampling, first=first, count=count)


@pytest.fixture
def trained() -> TrainedNetwork:
    return network_of()


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [
        ("{kind: annealed_langevin, steps_per_level: 3, epsilon: 2.0e-4}", 19),
        ("{kind: langevin, num_steps: 7, step_size: 1.0e-4}", 8),
        ("{kind: karras_heun, num_steps: 5, churn: 2.0}", 9),
        ("{kind: dpm_solver, num_steps: 7, eta: 0.5}", 7),
    ],
)
def test_each_sampler_makes_images_that_do_not_depend_on_their_batch(
    trained: TrainedNetwork, sampler: str, evaluations: int
) -> None:
    config, stages = config_with(f"sampling.sampler={sampler}"), list[int]()
    sampling = config.sampling
    assert evaluations_per_image(config) == evaluations
    whole = generate(trained, sampling=sampling, first=0, count=5, on_level=lambda stage, _: stages.append(stage))
    assert stages == list(range(len(visited(sampling.sampler, build.sigmas(config))) + 1))
    assert whole.shape == (5, 8, 8, 1) and whole.dtype == np.uint8 and not np.array_equal(whole[0], whole[1])
    alone = generate(trained, sampling=sampling, first=3, count=1)
    assert np.abs(whole[3].astype(int) - alone[0].astype(int)).max() <= 1


def test_bfloat16_is_the_networks_alone(trained: TrainedNetwork) -> None:
    convolved, states = set[torch.dtype](), set[torch.dtype]()
    trained.network.input.register_forward_hook(lambda module, given, made: convolved.add(made.dtype))  # type: ignore[operator]
    sampling = config_with("sampling.precision=bfloat16").sampling
    halved = generate(trained, sampling=sampling, first=0, count=4, on_level=lambda _, x: states.add(x.dtype))
    assert (convolved, states) == ({torch.bfloat16}, {torch.float32})
    difference = np.abs(halved.astype(int) - images(trained))
    assert difference.max() > 0 and difference.mean() < 2


UNET = "network.widths=[8, 8]"
DDPMPP = "network={kind: ddpmpp, base_width: 8, multipliers: [1, 2], blocks_per_resolution: 1, attention_sizes: [8]}"
PLAIN = ("data.num_classes=null", "train.label_dropout=0")
NCSN = "network={kind: ncsn, num_features: 4}"


@pytest.mark.parametrize("overrides", [(UNET,), (DDPMPP,), (NCSN, LANGEVIN, *PLAIN)])
def test_weights_in_bfloat16_are_those_that_autocast_makes(overrides: tuple[str, ...]) -> None:
    trained = network_of(*overrides)
    x, level = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 5])
    with torch.inference_mode():
        exact = trained.network(x, level)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, expected = (network(x, level).float() for network in (trained.halved, trained.network))
    if NCSN in overrides:
        # On a CPU, a mean-pooling convolution computes with weights before they are cast: another rounding of as much.
        assert 0 < (found - expected).norm() < 2 * (expected - exact).norm()
    else:
        assert torch.equal(found, expected)
    assert all(parameter.dtype == torch.bfloat16 for parameter in trained.halved.parameters() if parameter.dim() == 4)
    assert {parameter.dtype for parameter in trained.network.parameters()} == {torch.float32}


def test_precision_is_that_of_the_training_on_a_gpu_alone(trained: TrainedNetwork) -> None:
    half = network_of("train.precision=bfloat16")
    for each, device, found in ((trained, "cuda", "float32"), (half, "cpu", "float32"), (half, "cuda:0", "bfloat16")):
        assert with_precision(each.config.sampling, each, device).precision == found
    asked = config_with("sampling.precision=float32").sampling
    assert with_precision(asked, half, "cuda") == asked


GUIDED = pytest.param((DDPMPP, HEUN, FREE), marks=pytest.mark.slow)


@pytest.mark.parametrize("overrides", [GUIDED, (UNET, HEUN), (NCSN, LANGEVIN, *PLAIN)])
def test_a_chain_needs_one_graph(overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what samplers call; with another layout, type or mode it would be compiled again."""
    graphs: list[Any] = []

    def count(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network, **_: whole(network, backend=count, fullgraph=True))
    trained = network_of(*overrides)
    sampling = config_with(*overrides, "sampling.precision=bfloat16").sampling
    made = [generate(trained, sampling=sampling, first=first, count=2, compiled=True) for first in (0, 2)]
    assert len(graphs) == 1
    again = [generate(network_of(*overrides), sampling=sampling, first=first, count=2) for first in (0, 2)]
    np.testing.assert_array_equal(made, again)


@pytest.mark.parametrize(("count", "kept"), [(1, [0]), (3, [0, 1, 2]), (6, [0, 2, 4, 5]), (10, [0, 4, 8, 9])])
def test_a_strip_spreads_its_stages_evenly_and_ends_with_the_finished_images(
    count: int, kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ncsn.model.generate.STRIP_STAGES", 5)
    monkeypatch.setattr("ncsn.model.generate.level_images", lambda x, *_: x)
    config = config_with()
    strip = Strip(config.sampling, config)
    for number in range(count):
        strip(number, torch.full((1, 2, 2, 1), number))
    assert strip.frames(np.full((1, 2, 2, 1), 99, np.uint8))[:, 0, 0, 0, 0].tolist() == [*kept[:-1], 99]


def test_the_class_decides_the_image_and_the_batch_does_not(trained: TrainedNetwork) -> None:
    balanced = images(trained, count=7)
    np.testing.assert_array_equal(images(trained, first=5, count=1), balanced[5:6])
    cats = images(trained, "sampling.label=cat", count=7)  # the first class has the noise of balanced images
    assert [(image == cat).all() for image, cat in zip(balanced, cats, strict=True)] == [n % 3 == 0 for n in range(7)]


def test_images_of_two_classes_come_from_different_noise(trained: TrainedNetwork) -> None:
    starts: list[torch.Tensor] = []
    for label in ("cat", "dog"):
        sampling = config_with(f"sampling.label={label}").sampling
        states: list[torch.Tensor] = []
        generate(trained, sampling=sampling, first=0, count=4, on_level=lambda _, x, to=states: to.append(x.clone()))
        starts.append(states[0])
    cats, dogs = starts
    assert (cats - dogs).std() > cats.std()


@pytest.mark.parametrize("asked", ["{data: 5, cat: 4}", "{cat: 4, data: 5}"])
def test_images_by_class_are_those_of_each_class_alone(trained: TrainedNetwork, asked: str) -> None:
    settings = (f"sampling.label={asked}", "sampling.num_images=9")
    trained = replace(trained, classes=Classes(("cat", "dog", "data"), (1, 2, 3)))
    made = np.concatenate([images(trained, *settings, first=first, count=3) for first in (0, 3, 6)])
    alone = [images(trained, f"sampling.label={number}", count=count) for number, count in ((0, 4), (2, 5))]
    assert np.abs(made.astype(int) - np.concatenate(alone)).max() <= 1
    assert np.abs(alone[0].astype(int) - alone[1][:4]).max() > 1
    labels = image_labels(trained, config_with(*settings).sampling, first=2, count=7)
    assert labels is not None and labels.tolist() == [0, 0, 2, 2, 2, 2, 2]


def test_weight_zero_is_the_network_without_classes(trained: TrainedNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    unaware = images(trained, FREE, "sampling.guidance.weight=0.0")
    score_at = type(trained.network).score_at
    monkeypatch.setattr(type(trained.network), "score_at", lambda *a, labels: score_at(*a, labels=labels * 0 - 1))
    np.testing.assert_array_equal(images(trained), unaware)


@pytest.mark.parametrize(
    ("guidance", "sampler", "evaluations"),
    [
        ("{kind: classifier_free, weight: 1.0}", HEUN, 9),
        ("{kind: classifier_free}", HEUN, 18),
        # The grid is 2.0, 1.05, 0.49, 0.18, 0.05: two steps of Heun begin within.
        ("{kind: classifier_free, sigma_min: 0.2, sigma_max: 1.2}", HEUN, 9 + 4),
        ("{kind: classifier_free, sigma_max: 0.06}", HEUN, 9 + 1),
        ("{kind: classifier_free, sigma_min: 0.2}", HEUN, 9 + 6),
        # Two steps at each of 2.0, 0.96, 0.46, 0.22, 0.10 and 0.05, of which 0.96 and 0.46 are within; one denoises.
        ("{kind: classifier_free, sigma_min: 0.2, sigma_max: 1.2}", LANGEVIN, 13 + 4),
    ],
)
def test_evaluations_of_both_networks_are_counted(
    trained: TrainedNetwork, guidance: str, sampler: str, evaluations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_with(sampler, f"sampling.guidance={guidance}")
    assert evaluations_per_image(config) == evaluations
    calls = []
    real = type(trained.network).score_at
    monkeypatch.setattr(type(trained.network), "score_at", lambda *a, **k: calls.append(1) or real(*a, **k))
    generate(trained, sampling=config.sampling, first=0, count=2)
    assert len(calls) == evaluations


def saved(trained: TrainedNetwork, folder: Path) -> str:
    folder.mkdir()
    save_network(trained, folder)
    return str(folder)


@pytest.mark.parametrize("overrides", [(), (*PLAIN, "network.widths=[8]"), ("noise.num_levels=3",)])
def test_another_checkpoint_guides(trained: TrainedNetwork, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    worse = replace(network_of(*overrides, seed=1), moments=trained.moments)  # with which a chain starts
    uri = saved(worse, tmp_path / "worse")
    auto = f"sampling.guidance={{kind: autoguidance, checkpoint: {uri}, weight: 0.0}}"
    if worse.config.levels == trained.config.levels:
        alone = generate(worse, sampling=config_with().sampling, first=0, count=4)
        np.testing.assert_array_equal(images(trained, auto), alone)
    assert (images(trained, auto, "sampling.guidance.weight=2.0") != images(trained)).any()


def test_a_guide_that_is_missing_or_of_other_images_is_refused(trained: TrainedNetwork, tmp_path: Path) -> None:
    others = [
        replace(network_of(), classes=Classes(("fish", "dog", "bird"), (1, 2, 3))),
        network_of("data.image_size=16"),
        network_of("data.channels=3"),
        network_of(NCSN, *PLAIN, LANGEVIN, "noise.num_levels=3"),
    ]
    places = [saved(each, tmp_path / str(number)) for number, each in enumerate(others)]
    for uri in (str(tmp_path / "nowhere"), "models:/x@weak", *places):
        with refused("sampling.guidance.checkpoint"):
            images(trained, f"sampling.guidance={{kind: autoguidance, checkpoint: '{uri}'}}")


def test_a_registered_model_has_its_guide_and_classes_with_it(trained: TrainedNetwork, tmp_path: Path) -> None:
    worse = network_of("network.widths=[8]", seed=1)
    uri = saved(worse, tmp_path / "worse")
    auto = f"sampling.guidance={{kind: autoguidance, checkpoint: {uri}, weight: 2.0}}"
    expected, guided = images(trained, auto), replace(trained, config=config_with(auto), guide=worse)
    loaded = load_checkpoint(saved(guided, tmp_path / "model"))
    Path(uri).rename(tmp_path / "gone")
    assert (loaded.classes, loaded.digest) == (trained.classes, weights_digest(trained.network))
    np.testing.assert_array_equal(images(loaded, auto), expected)


@pytest.mark.parametrize("sampler", [HEUN, "sampling.sampler={kind: dpm_solver, num_levels: 4}", LANGEVIN])
def test_other_levels_sample_as_a_network_that_has_them(sampler: str) -> None:
    levels, lognormal = "{num_levels: 4, sigma_1: 1.3, sigma_L: 0.07}", "noise.training={kind: lognormal}"
    own, theirs = network_of(lognormal), network_of(f"noise={levels}", lognormal)
    chosen = (sampler, FREE, lognormal, f"sampling.levels={levels}")
    expected = images(theirs, sampler, FREE)
    assert (images(own, sampler, FREE) != expected).any()
    np.testing.assert_array_equal(images(own, *chosen), expected)
    assert evaluations_per_image(config_with(*chosen)) == evaluations_per_image(
        config_with(sampler, FREE, f"noise={levels}")
    )
    assert sampling_facts(config_with(*chosen).sampling, None)["levels"]["sigma_1"] == 1.3


ODD = Classes(("cat", "dog", "1"), (10, 0, 30))  # one without images, and one that is named like a number


def test_labels_are_a_function_of_the_image(trained: TrainedNetwork) -> None:
    def labels(label: str, *, first: int = 0, count: int = 6, seed: int = 0) -> list[int]:
        sampling = trained.config.sampling.model_copy(update={"label": label, "seed": seed})
        found = image_labels(replace(trained, classes=ODD), sampling, first=first, count=count)
        assert found is not None
        return found.tolist()

    assert labels("balanced") == [0, 1, 2, 0, 1, 2] and labels("balanced", first=4, count=2) == [1, 2]
    assert labels("dog") == [1] * 6
    drawn = labels("data", count=100_000)
    assert labels("data", first=400, count=7) == drawn[400:407]
    assert labels("data", count=1000, seed=1) != drawn[:1000]
    shares = torch.bincount(torch.tensor(drawn), minlength=3) / len(drawn)
    assert shares.tolist() == pytest.approx([0.25, 0.0, 0.75], abs=4 * (0.25 * 0.75 / len(drawn)) ** 0.5)


def test_a_class_is_a_name_or_else_a_number() -> None:
    plain = Classes(("cat", "dog"), (1, 1))
    assert [plain.index(text, key="k") for text in ("cat", "0", "1")] == [0, 0, 1]
    assert [ODD.index(text, key="k") for text in ("cat", "1")] == [0, 2]
    for text in ("bird", "0", "3", "-1", "", {"cat": 1, "bird": 2}):
        with refused("sampling.label") as caught:
            require_label(text, ODD)
        assert "cat, dog, 1" in caught.value.problems[0].hint
    require_label("balanced", ODD)
    require_label("data", ODD)
