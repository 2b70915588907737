"""The example scripts: known answers of their parts, and in `make test-all` each as a user runs it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import inpaint_and_restore
import likelihood
import neon
import paper_figures
import pytest
import small_images
import torch
from PIL import Image

SCRIPTS = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def images() -> small_images.Images:
    return small_images.digits()


@pytest.fixture(scope="module")
def model(images: small_images.Images) -> small_images.Model:
    """A network that was trained for a few seconds."""
    return small_images.train(images, num_images=6400, widths=(16, 32))


def test_training_learns_goes_on_and_an_image_depends_on_its_seed_and_number_alone(images, model):
    few, many = model.sample(2, seed=3), model.sample(5, seed=3)
    torch.testing.assert_close(few, many[:2], rtol=0, atol=1e-4)
    fresh = small_images.train(images, num_images=64, widths=(16, 32))
    real = small_images.statistics(images.train)
    learned, before = (neon.distance(each, real, seed=0, count=128) for each in (model, fresh))
    assert learned < 0.5 * before
    again = small_images.train(images, num_images=64, start=model, learning_rate=0.0)
    for one, other in zip(model.network.parameters(), again.network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_the_least_value_is_between_the_places():
    assert neon.lowest_point({0.5: 0.545, 1.0: 0.4635, 2.0: 0.478}) == pytest.approx(1.44, abs=0.005)
    assert neon.lowest_point({w: (w - 1.3) ** 2 for w in (0.0, 0.5, 1.0, 1.5, 3.0)}) == pytest.approx(1.3)
    assert neon.lowest_point({0.0: 1.0, 0.5: 2.0, 1.0: 3.0}) == 0.0
    assert neon.lowest_point({0.0: 3.0, 0.5: 2.0, 3.0: 1.0}) == 3.0


def test_bits_of_uniform_noise_of_a_normal_distribution_and_fewer_of_a_trained_network(images, model):
    generator = torch.Generator().manual_seed(0)
    assert likelihood.bits(torch.zeros(3), 4).tolist() == pytest.approx([math.log2(17)] * 3)
    x = 0.5 + 0.1 * torch.randn(20_000, 1, 2, 2, generator=generator)
    entropy = math.log2(0.1 * math.sqrt(2 * math.pi * math.e))  # of a pixel, in bits
    assert likelihood.normal_bits(x, x).mean().item() == pytest.approx(math.log2(17) + entropy, abs=0.01)
    x = likelihood.dequantized(images.test[:16], generator)
    normal = likelihood.normal_bits(likelihood.dequantized(images.train, generator), x)
    assert likelihood.network_bits(model, x, steps=24, probes=1).mean() < normal.mean()


def test_known_pixels_come_back_and_measurements_are_met(images, model):
    truth = images.test[:4]
    left = torch.zeros(8, 8, dtype=torch.bool)
    left[:, :4] = True
    completed = inpaint_and_restore.complete(model, truth, left)
    assert torch.equal(completed[..., :4], truth[..., :4])
    operator = inpaint_and_restore.means(8, 8, factor=2)
    y = operator.apply(truth)
    made = inpaint_and_restore.restore(model, y, operator, sigma_y=0.0)
    error, unguided = ((operator.apply(x) - y).square().mean() for x in (made, model.sample(4)))
    assert error < 0.1 * unguided


def test_weights_move_away_from_the_self_training(model):
    torch.manual_seed(0)
    other = small_images.Model(small_images.new_network(small_images.digits(), widths=(16, 32)), model.moments)
    for w, expected in ((0.0, model), (-1.0, other)):
        found = neon.moved(model, other, w).network.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.network.named_parameters())
    one, two, found = (each.network.state_dict() for each in (model, other, neon.moved(model, other, 1.5)))
    for name, _ in model.network.named_parameters():
        torch.testing.assert_close(found[name], one[name] - 1.5 * (two[name] - one[name]))


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
