"""A registered model of classes: a class and the weight of its guidance as params, and its identity."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ncsn.config import Config
from ncsn.model import build
from ncsn.model.checkpoint import SamplingCheckpoint
from ncsn.model.classes import Classes
from ncsn.model.generate import generate
from ncsn.tracking.registry import Candidate, write_model

CLASSES = ("data.num_classes=3", "train.label_dropout=0.1")
FREE = "sampling.guidance={kind: classifier_free, weight: 2.5, sigma_max: 0.5}"
PETS = Classes(("cat", "dog", "bird"), (1, 2, 3))


def network_of(config: Config) -> torch.nn.Module:
    """A network whose score depends on the class."""
    network = build.network(config).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    for _, parameter in sorted(network.named_parameters()):
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return network


@pytest.fixture(scope="module")
def known(checkpoint, make_config) -> SamplingCheckpoint:
    config = make_config(*CLASSES)
    return replace(checkpoint, config=config, network=network_of(config), classes=PETS)


@pytest.fixture(scope="module")
def model(known, tmp_path_factory):
    import mlflow.pyfunc

    folder: Path = tmp_path_factory.mktemp("known") / "model"
    write_model(folder, known, metadata={}, files={})
    return mlflow.pyfunc.load_model(str(folder))


def assert_alike(images: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1)


@pytest.mark.parametrize(
    ("params", "overrides"),
    [
        ({}, []),
        ({"label": "bird"}, ["sampling.label=bird"]),
        ({"label": "1"}, ["sampling.label=dog"]),
        ({"label": "data"}, ["sampling.label=data"]),
        ({"guidance": 1.0}, []),
        (
            {"label": "cat", "guidance": 3.0},
            ["sampling.label=0", "sampling.guidance={kind: classifier_free, weight: 3}"],
        ),
    ],
)
def test_a_class_and_the_weight_of_guidance_are_params(model, known, make_config, params, overrides):
    sampling = make_config(*CLASSES, *overrides).sampling
    expected = generate(known, sampling=sampling, first=0, count=5)
    assert_alike(model.predict(None, params={"n_images": 5, **params}), expected)


def test_an_unknown_class_is_told_all_names(model):
    from mlflow.exceptions import MlflowException

    for label in ("fish", "3"):
        with pytest.raises(MlflowException, match=re.escape("cat, dog, bird")) as caught:
            model.predict(None, params={"label": label})
        assert "label" in str(caught.value) and caught.value.error_code == "INVALID_PARAMETER_VALUE"


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e6, -1.0])
def test_a_weight_of_guidance_out_of_range_is_refused(model, weight):
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=r"guidance.*\b100\b") as caught:
        model.predict(None, params={"n_images": 1, "guidance": weight})
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE" and "\n" not in str(caught.value)


def test_configured_guidance_keeps_its_band_where_the_weight_is_another(known, make_config, tmp_path):
    import mlflow.pyfunc

    guided = replace(known, config=make_config(*CLASSES, FREE))
    write_model(tmp_path / "model", guided, metadata={}, files={})
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    for params, weight in (({}, 2.5), ({"guidance": 4.0}, 4.0), ({"guidance": 1.0}, 1.0)):
        sampling = make_config(*CLASSES, FREE, f"sampling.guidance.weight={weight}").sampling
        expected = generate(guided, sampling=sampling, first=0, count=3)
        assert_alike(model.predict(None, params={"n_images": 3, **params}), expected)


def test_guidance_and_the_weights_of_the_guide_are_part_of_a_versions_identity(checkpoint, make_config):
    def digest(*overrides: str, guide: torch.nn.Module | None = None) -> str:
        config = make_config(*overrides)
        worse = None if guide is None else replace(checkpoint, config=make_config(), network=guide)
        each = replace(checkpoint, config=config, guide=worse)
        return Candidate(name="x", checkpoint=each, card="", files={}, metrics={}, tags={}).digest

    assert digest() == digest("sampling.guidance=null"), "as before there was guidance"
    one, other = build.network(make_config()), network_of(make_config())
    auto = "sampling.guidance={kind: autoguidance, checkpoint: a, weight: 2}"
    digests = [
        digest(),
        digest(*CLASSES, FREE),
        digest(*CLASSES, "sampling.label=1"),
        digest(auto, guide=one),
        digest(auto, guide=other),
        digest(auto, "sampling.guidance.weight=3", guide=other),
    ]
    assert len(set(digests)) == len(digests)
    assert digest(auto, "sampling.guidance.checkpoint=b", guide=other) == digests[4], "wherever the weights are"
