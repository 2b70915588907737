"""Running averages of the weights, and those put together after training: oracle 23, and those of section 2."""

import numpy as np
import pytest
import torch
from torch import nn

from ncsn.core.ema import WIDEST, Decay, Ema, exponent_of, half_life, power_function, relative_width, step_decay
from ncsn.core.reconstruction import Profile, reconstruction


def constant(value: float) -> nn.Linear:
    module = nn.Linear(2, 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


@pytest.mark.oracle(23)
def test_average_of_a_constant_from_zero():
    ema, module = Ema(constant(0.0), step_decay(0.999)), constant(5.0)
    for _ in range(1000):
        ema.update(module, images_seen=1, batch=1)
    assert ema.num_updates == 1000
    assert ema.weights["weight"].mean().item() == pytest.approx(5 * (1 - 0.999**1000), rel=1e-5)
    assert ema.weights["bias"][0].item() == pytest.approx(5 * 0.6323, rel=1e-4)


def test_other_networks_are_refused_and_nothing_is_written():
    ema = Ema(constant(1.0), step_decay(0.9))
    with pytest.raises(ValueError, match=r"bias.*scale"):
        ema.restore({"weight": torch.zeros(3, 2), "scale": torch.zeros(1)}, num_updates=1)
    assert ema.weights["weight"].eq(1).all() and ema.num_updates == 0


IMAGES = 2**21
HALF = 500_000


def averages(decay: Decay, batch: int) -> tuple[float, float]:
    """The averages of weights that are 0 at first, then 1; and that grow evenly from 0 to 1."""
    constant = growing = 0.0
    for seen in range(batch, IMAGES + batch, batch):
        kept = decay(seen, batch)
        constant = kept * constant + (1 - kept)
        growing = kept * growing + (1 - kept) * seen / IMAGES
    return constant, growing


@pytest.mark.parametrize(("batch", "plain", "ramped"), [(64, 0.674838, 0.932733), (2048, 0.675285, 0.933173)])
def test_a_half_life_in_images_does_not_depend_on_the_batch_size(batch: int, plain: float, ramped: float) -> None:
    constant, growing = averages(half_life(HALF, None), batch)
    assert constant == pytest.approx(1 - 0.5 ** (IMAGES / HALF), abs=1e-12)
    assert growing == pytest.approx(plain, abs=1e-6)
    # In the ramp it is the power-function average, of (g + 1) / (g + 2) = 0.932719 for small batches.
    assert averages(half_life(HALF, 0.05), batch)[1] == pytest.approx(ramped, abs=1e-6)


def snapshots(count: int) -> list[Profile]:
    return [Profile(exponent, (k + 1) / count) for k in range(count) for exponent in map(exponent_of, (0.05, 0.10))]


def test_widths_and_exponents() -> None:
    for width, exponent in ((0.010, 96.99490), (0.05, 16.97220), (0.10, 6.93720), (0.25, 0.71982), (WIDEST, 0)):
        assert exponent_of(width) == pytest.approx(exponent, abs=5e-6)
        assert relative_width(exponent_of(width)) == pytest.approx(width, abs=1e-9)
    for width in (0.0, 0.3):
        with pytest.raises(ValueError, match=rf" {width}$"):
            exponent_of(width)


def test_weights_of_the_steps_are_exact() -> None:
    exponent, count = 6.94, 50
    decay, found = power_function(exponent), np.zeros(count)
    for step, weights in enumerate(np.eye(count), 1):
        found = decay(8 * step, 8) * found + (1 - decay(8 * step, 8)) * weights
    steps = np.arange(1, count + 1) ** (exponent + 1)
    np.testing.assert_allclose(found, np.diff(steps, prepend=0) / steps[-1], rtol=1e-9)


def test_two_pairs() -> None:
    target = Profile(exponent_of(0.075), 1.0)
    held, error = reconstruction(snapshots(2), target)
    np.testing.assert_allclose(held, [0.008457830, -0.021962860, 0.370862630, 0.642642400], atol=1e-8)
    assert error == pytest.approx(0.0478166, abs=1e-7) and sum(held) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("count", "width", "error", "drift"),
    [(4, 0.075, 0.0334, 6.8e-4), (8, 0.20, 0.0771, 4.4e-3), (16, 0.03, 0.0386, -1.9e-4), (16, 0.15, 0.0090, 4.7e-5)],
)
def test_errors_of_reconstructions(count: int, width: float, error: float, drift: float) -> None:
    """Relative error of the profile, and the error on weights that grow evenly."""
    stored, target = snapshots(count), Profile(exponent_of(width), 1.0)
    means = np.array([profile.time * (profile.exponent + 1) / (profile.exponent + 2) for profile in stored])
    wanted = (target.exponent + 1) / (target.exponent + 2)
    coefficients, found = reconstruction(stored, target)
    assert found == pytest.approx(error, abs=6e-5)
    assert coefficients @ means - wanted == pytest.approx(drift, rel=0.08)
