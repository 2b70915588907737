"""What a model makes of given images: completions, log-likelihoods and the nearest training images."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from do import recorded
from experiments import digits, tiny
from refused import refused
from served import trained_by
from torch import Tensor

from ncsn import ScoreModel, fit
from ncsn.config import to_yaml
from ncsn.core.networks.base import PreconditionedNetwork
from ncsn.data.format import load_manifest
from ncsn.data.training_images import open_cache
from ncsn.runs.layout import RunFolder

PLAIN = ("data.num_classes=null", "train.label_dropout=0", "noise.num_levels=20")
FLOATS = ("data.source=image_folder", "data.dtype=float32", "data.value_range=[-2, 6]")
UINT16 = ("data.source=image_folder", "data.dtype=uint16")
NCSN = ("network={kind: ncsn, num_features: 4}", "sampling.sampler={kind: annealed_langevin}")
TUNED = ("loss={kind: consistency}", "noise.training={kind: lognormal}", "train.init_from=a")
MASK = np.ones((8, 8), bool)
SPREAD, RHO = 0.15, 0.8


def model_of(*overrides: str) -> ScoreModel:
    """Of a network without weights, whose density is N(0.5, 0.25^2) in each pixel."""
    trained = trained_by(0, *PLAIN, *overrides)
    for parameter in trained.network.parameters():
        parameter.zero_()
    return ScoreModel(trained)


def gray(value: Any, count: int = 2) -> Any:
    return np.full((count, 8, 8, 1), value)


class Halves(PreconditionedNetwork):
    """N(0.5, SPREAD^2), in which each pixel of the left half is correlated with that of the right half."""

    def score_at(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        left, right = (x - 0.5).chunk(2, dim=3)
        noise = sigma.square().view(-1, 1, 1, 1)
        both, apart = ((left + s * right) / (2 * (SPREAD**2 * (1 + s * RHO) + noise)) for s in (1, -1))
        return -torch.cat([both + apart, both - apart], dim=3)


def test_completions_of_a_correlated_gaussian_have_the_conditional_moments() -> None:
    images, left = np.concatenate([gray(np.uint8(166), 1), gray(np.uint8(90), 1)]), np.arange(8) < 4
    trained = trained_by(0, *PLAIN, "sampling.batch_size=40")
    network = Halves(sigmas=trained.network.sigmas, sigma_data=SPREAD, dropout=0.0)
    network.anything = torch.nn.Parameter(torch.zeros(()))  # is on the model's device
    made = ScoreModel(replace(trained, network=network)).inpaint(images, np.tile(left, (8, 1)), 32)
    np.testing.assert_array_equal(made[:, :, :, left], np.broadcast_to(images[:, None, :, left], (2, 32, 8, 4, 1)))
    unknown = made[:, :, :, ~left] / 255 - 0.5
    expected = RHO * (images[:, 0, 0, 0] / 255 - 0.5)
    assert unknown.mean(axis=(1, 2, 3, 4)) == pytest.approx(expected, rel=0.15)
    assert unknown.std(axis=(1, 2, 3, 4)) == pytest.approx([SPREAD * math.sqrt(1 - RHO**2)] * 2, rel=0.15)


def test_where_all_is_known_images_return_and_where_nothing_is_they_are_samples(monkeypatch) -> None:
    monkeypatch.setattr("ncsn.library.model._STEPS", 10)  # enough for pixels without correlation
    model, mask = model_of(), np.zeros((3, 8, 8), bool)
    mask[0] = True
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    made = model.inpaint(images, mask, 16, seed=3)
    assert (made[0] == images[0]).all()
    samples = model.sample(128) / 255
    assert made[1:].mean() / 255 == pytest.approx(samples.mean(), abs=0.02)
    assert made[1:].std() / 255 == pytest.approx(samples.std(), rel=0.1)
    others = np.where(mask[..., None], images, 255 - images)
    np.testing.assert_array_equal(made, model.inpaint(others, mask, 16, seed=3))
    assert (made != model.inpaint(images, mask, 16, seed=4)).any()


@pytest.mark.parametrize(
    ("overrides", "images", "x", "steps"),
    [
        ((), gray(np.uint8(200)), 200.5 / 256, 256),
        (("data.dequantize=false",), gray(np.uint8(200)), 200 / 255, 255),
        (UINT16, gray(np.uint16(9999)), 9999.5 / 65536, 65536),
        (FLOATS, gray(np.float32(0.7)), 2.7 / 8, 1),
    ],
)
def test_pixels_of_each_type_are_completed_and_have_the_likelihood_of_a_gaussian(overrides, images, x, steps) -> None:
    model, known = model_of(*overrides), np.eye(8, dtype=bool)
    made, found = model.inpaint(images, known), model.log_likelihood(images)
    assert made.dtype == images.dtype and (made[:, 0, known] == images[0, 0, 0, 0]).all() and (made != images).any()
    variance = 0.25**2 + 0.01**2
    density = -0.5 * (x - 0.5) ** 2 / variance - 0.5 * math.log(2 * math.pi * variance)
    assert found.dtype == np.float64 and found.shape == (2,)
    assert found == pytest.approx([density / math.log(2) - math.log2(steps)] * 2, abs=0.003)


def test_a_class_changes_both_and_a_batch_changes_no_log_likelihood(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = ScoreModel(trained_by(0)), np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    monkeypatch.setattr("ncsn.library.model._STEPS", 5)
    monkeypatch.setattr("ncsn.library.model._ODE_STEPS", 8)
    dogs, cats = (model.inpaint(images, MASK & False, label=label) for label in ("dog", "cat"))
    assert (dogs != cats).any()
    found = model.log_likelihood(images, label="dog")
    monkeypatch.setattr("ncsn.library.model._ODE_IMAGES", 2)
    np.testing.assert_allclose(model.log_likelihood(images, label=1), found, rtol=1e-4)
    assert abs(model.log_likelihood(images) - found).min() > 1e-4


@pytest.mark.parametrize(
    ("method", "overrides", "given", "key"),
    [
        *(("inpaint", (), {"mask": mask}, "mask") for mask in (MASK[1:], MASK[None], 1 * MASK, None)),
        *(("inpaint", (), {"mask": MASK, "n": n}, "n") for n in (0, 1.5)),
        ("inpaint", (), {"mask": MASK, "images": gray(0)}, "images"),
        ("inpaint", (), {"mask": MASK, "seed": -1}, "seed"),
        *(("log_likelihood", (), {"images": images}, "images") for images in (gray(0.5), gray(np.uint8(0))[0], None)),
        ("log_likelihood", FLOATS, {"images": gray(np.float32("nan"))}, "images"),
        ("log_likelihood", (), {"label": 1}, "label"),
        ("log_likelihood", ("data.num_classes=3",), {}, "label"),
        ("log_likelihood", NCSN, {}, "network.kind"),
        ("log_likelihood", (*TUNED, "sampling.sampler={kind: consistency}"), {}, "model"),
        ("nearest", (), {}, "model"),
    ],
)
def test_what_a_model_cannot_do_is_refused(method, overrides, given, key) -> None:
    with refused(key):
        getattr(model_of(*overrides), method)(**{"images": gray(np.uint8(9))} | given)


def test_a_training_image_is_nearest_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, folder = tiny(".ncsn"), RunFolder(str(tmp_path / ".ncsn"), "mine")
    dataset = digits(config, f"{folder.root}/datasets/sklearn_digits")
    trained = replace(trained_by(0, *PLAIN), dataset_digest=load_manifest(dataset).digest)
    ScoreModel(trained).save(checkpoint := f"{folder.checkpoints}/images-000000016")
    Path(folder.config).write_text(to_yaml(trained.config))
    recorded(folder, "train", result={"checkpoint": checkpoint})
    model, real = ScoreModel.load("mine", device="cpu"), open_cache(dataset, "train").images
    images, rows, distances = model.nearest(real[5:25], k=3)
    assert rows.shape == (20, 3) and rows[:, 0].tolist() == list(range(5, 25))
    np.testing.assert_array_equal(images, real[rows], strict=True)
    assert distances[:, 0].max() < 0.1 and distances[:, 1].min() > 5 and (np.diff(distances) >= 0).all()
    with refused("k"):
        model.nearest(real[:2], k=33)
    Path(dataset, "manifest.json").unlink()
    with refused("model"):
        model.nearest(real[:2])


def test_a_model_that_was_fitted_here_has_its_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncsn.library.model._STEPS", 2)
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8), np.uint8)
    model = fit(images, hours=1e-5, network={"kind": "ncsn", "num_features": 4})
    found = model.nearest(images[[7, 2], ..., None])
    assert found.rows.tolist() == [[7], [2]] and (found.images[:, 0, ..., 0] == images[[7, 2]]).all()
    assert model.inpaint(found.images[:, 0], MASK & False, 3).shape == (2, 3, 8, 8, 1), "at its own levels"
