"""Power-function averages and their reconstruction: the oracles of chapter 2's section 2."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ncsn.core.ema import WIDEST, PowerFunction, Profile, exponent_of, inner_product, reconstruction, relative_width

PAIR = (exponent_of(0.05), exponent_of(0.10))
TABLE = {
    0.010: 96.99490,
    0.025: 36.98684,
    0.05: 16.97220,
    0.075: 10.28912,
    0.10: 6.93720,
    0.15: 3.55787,
    0.20: 1.82621,
    0.25: 0.71982,
}


def average(exponent: float, values: np.ndarray) -> np.ndarray:
    """The average of weights [N, ...] after N steps, step by step."""
    profile, kept = PowerFunction(exponent), np.zeros_like(values[0])
    for step, value in enumerate(values, 1):
        decay = profile.decay(images_seen=8 * step, batch=8)
        kept = decay * kept + (1 - decay) * value
    return kept


def snapshots(count: int) -> list[Profile]:
    return [Profile(exponent, (k + 1) / count) for k in range(count) for exponent in PAIR]


@pytest.mark.parametrize(("width", "exponent"), TABLE.items())
def test_widths_and_exponents(width: float, exponent: float) -> None:
    assert exponent_of(width) == pytest.approx(exponent, abs=5e-6)
    assert relative_width(exponent_of(width)) == pytest.approx(width, abs=1e-12)


def test_published_exponents() -> None:
    assert relative_width(16.97) == pytest.approx(0.050005, abs=5e-7)
    assert relative_width(6.94) == pytest.approx(0.099972, abs=5e-7)
    assert exponent_of(WIDEST) == pytest.approx(0, abs=1e-9)
    for width in (0.0, 0.3):
        with pytest.raises(ValueError, match=rf" {width}$"):
            exponent_of(width)


@pytest.mark.parametrize(
    ("power", "exponent", "mean"),
    [(1, 16.97, 0.947407), (1, 6.94, 0.888265), (2, 16.97, 0.900081), (2, 6.94, 0.799009)],
)
def test_averages_of_growing_weights(power: int, exponent: float, mean: float) -> None:
    steps = np.arange(1, 4097) / 4096
    assert average(exponent, steps**power) == pytest.approx(mean, abs=1e-6)
    limit = (exponent + 1) / (exponent + 1 + power)
    assert average(exponent, steps**power) == pytest.approx(limit, abs=3e-4)


def test_the_first_step_forgets_the_initial_weights() -> None:
    assert PowerFunction(6.94).decay(images_seen=64, batch=64) == 0
    assert average(6.94, np.full(100, 3.25)) == pytest.approx(3.25, abs=1e-14)


def test_weights_of_the_steps_are_exact() -> None:
    exponent, count = 6.94, 50
    found = average(exponent, np.eye(count))
    steps = np.arange(1, count + 1) ** (exponent + 1)
    np.testing.assert_allclose(found, np.diff(steps, prepend=0) / steps[-1], rtol=1e-9)
    assert found.sum() == pytest.approx(1, abs=1e-12)


def test_inner_products_are_integrals() -> None:
    one, other = Profile(3.0, 0.5), Profile(1.5, 0.8)
    tau = (np.arange(200_000) + 0.5) / 200_000 * 0.5
    product = (4 * tau**3 / 0.5**4) * (2.5 * tau**1.5 / 0.8**2.5)
    assert inner_product(one, other) == pytest.approx(product.mean() * 0.5, rel=1e-8)
    assert inner_product(one, other) == inner_product(other, one)


@pytest.mark.parametrize("number", range(4))
def test_a_stored_average_is_found_again(number: int) -> None:
    stored = snapshots(2)
    found = reconstruction(stored, stored[number])
    np.testing.assert_allclose(found.coefficients, np.eye(4)[number], atol=1e-9)
    assert found.error < 1e-6


def test_two_pairs() -> None:
    target = Profile(exponent_of(0.075), 1.0)
    held = reconstruction(snapshots(2), target)
    np.testing.assert_allclose(held.coefficients, [0.008457830, -0.021962860, 0.370862630, 0.642642400], atol=1e-8)
    assert held.error == pytest.approx(0.0478166, abs=1e-7) and held.coefficients.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("count", "width", "error", "drift"),
    [
        (4, 0.075, 0.0334, 6.8e-4),
        (4, 0.15, 0.1025, 2.0e-3),
        (8, 0.075, 0.0125, 1.5e-4),
        (8, 0.15, 0.0331, 3.4e-4),
        (8, 0.20, 0.0771, 4.4e-3),
        (16, 0.03, 0.0386, -1.9e-4),
        (16, 0.15, 0.0090, 4.7e-5),
    ],
)
def test_errors_of_reconstructions(count: int, width: float, error: float, drift: float) -> None:
    """Relative error of the profile, and the error on weights that grow evenly."""
    stored, target = snapshots(count), Profile(exponent_of(width), 1.0)
    means = np.array([profile.time * (profile.exponent + 1) / (profile.exponent + 2) for profile in stored])
    wanted = (target.exponent + 1) / (target.exponent + 2)
    found = reconstruction(stored, target)
    assert found.error == pytest.approx(error, abs=6e-5)
    assert found.coefficients @ means - wanted == pytest.approx(drift, rel=0.08)


@pytest.mark.parametrize(("count", "narrow", "wide"), [(8, 1.3e-3, 4.3e-3), (16, 1.1e-4, 3.8e-4)])
def test_random_walks_are_reconstructed(count: int, narrow: float, wide: float) -> None:
    steps = 4096
    walk = np.random.default_rng(0).standard_normal((steps, 200)).cumsum(axis=0)
    stored = snapshots(count)
    values = np.stack([average(profile.exponent, walk[: round(profile.time * steps)]) for profile in stored])
    for width, error in ((0.075, narrow), (0.15, wide)):
        target = Profile(exponent_of(width), 1.0)
        wanted = average(target.exponent, walk)
        built = reconstruction(stored, target).coefficients @ values
        assert math.sqrt(np.mean((built - wanted) ** 2) / np.mean(wanted**2)) < 3 * error
