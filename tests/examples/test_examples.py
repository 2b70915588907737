"""The example scripts: known answers of their parts, and in `make test-all` each as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import inpainting
import paper_figures
import pytest
import small_images
import torch
from PIL import Image

from ncsn.evaluation.frechet import frechet_distance

SCRIPTS = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def images() -> small_images.Images:
    return small_images.digits()


@pytest.fixture(scope="module")
def model(images: small_images.Images) -> small_images.Model:
    """A network that was trained for a few seconds."""
    return small_images.train(images, num_images=6400, widths=(16, 32))


def test_training_learns_and_an_image_depends_on_its_seed_and_number_alone(images, model):
    few, many = model.sample(2, seed=3), model.sample(5, seed=3)
    torch.testing.assert_close(few, many[:2], rtol=0, atol=1e-4)
    fresh = small_images.train(images, num_images=64, widths=(16, 32))
    real = paper_figures.statistics(images.train)
    learned, before = (frechet_distance(paper_figures.statistics(each.sample(128)), real) for each in (model, fresh))
    assert learned < 0.5 * before


def test_known_pixels_come_back_and_the_others_fit_them(images, model):
    truth = images.test[:128]
    left = torch.zeros(8, 8, dtype=torch.bool)
    left[:, :4] = True
    completed = inpainting.complete(model, truth, left)
    assert torch.equal(completed[..., :4], truth[..., :4])
    others = completed.roll(1, dims=0)
    near, far = ((x - truth)[..., 4:].square().mean() for x in (completed, others))
    assert near < 0.9 * far, "than completions of other digits"


def test_interpolations_end_in_the_samples_and_the_chain_has_a_state_per_level(images, model):
    found = paper_figures.interpolations(model, rows=2, columns=3)
    samples = model.sample(4, sampler=paper_figures.HEUN)
    torch.testing.assert_close(found[:, 0], samples[0::2], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[:, -1], samples[1::2], rtol=0, atol=1e-4)
    assert paper_figures.chain(model, rows=2).shape == (19, 2, 1, 8, 8)
    shown = paper_figures.neighbors(model, images, rows=2, columns=3)
    distances = (shown[:, 1:] - shown[:, :1]).flatten(2).norm(dim=2)
    assert torch.equal(distances, distances.sort(dim=1).values)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_draws_its_picture(tmp_path, script):
    done = subprocess.run(
        [sys.executable, script, "--out", tmp_path / "picture.png"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "picture.png") as picture:
        assert min(picture.size) > 50 and len(picture.convert("L").getcolors(256) or []) > 2
