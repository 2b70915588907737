"""The held-out loss and its alarm, on images of known distribution."""

from __future__ import annotations

import numpy as np
import torch

from ncsn.core.held_out import losses_at
from ncsn.core.keyed_random import Stream
from ncsn.runs.gaps import Alarm, Gaps

SIGMAS = torch.tensor([2, 1, 0.5, 0.25, 0.1, 0.03], dtype=torch.float64)
SPREAD, SIDE = 0.25, 8  # standard deviation of a pixel, and pixels of a side
LEVELS = range(len(SIGMAS))


def images(count: int, seed: int) -> torch.Tensor:
    draws = torch.randn(count, 1, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return SPREAD * draws


class Memorizer:
    """The exact score of these points with noise: what a network learns that can learn anything."""

    def __init__(self, points: torch.Tensor) -> None:
        self.points = points.flatten(1)

    def __call__(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        sigma, flat = SIGMAS[level][:, None], x.flatten(1)
        weights = torch.softmax(-torch.cdist(flat, self.points).square() / (2 * sigma**2), dim=1)
        return ((weights @ self.points - flat) / sigma**2).view_as(x)


def optimal(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """The score of all images of the distribution with noise."""
    return -x / (SPREAD**2 + SIGMAS[level] ** 2).view(-1, 1, 1, 1)


def losses(network, x: torch.Tensor, *, stream: int = Stream.HELD_OUT_NOISE) -> np.ndarray:
    return losses_at(network, x, first=0, sigmas=SIGMAS, levels=LEVELS, stream=stream).double().numpy()


def gaps(network, training: torch.Tensor, held_out: torch.Tensor) -> Gaps:
    return Gaps.of(losses(network, held_out), losses(network, training, stream=Stream.TRAINED_NOISE))


def test_a_memorizer_of_16_images_raises_the_alarm() -> None:
    """Loss of training images at sigma 2 ... 0.03, and of others, whose nearest image is the wrong one."""
    training = images(16, seed=0)
    network = Memorizer(training)
    found = gaps(network, training.repeat(250, 1, 1, 1), images(4000, seed=1))
    np.testing.assert_allclose(found.held_out, [0.0173, 0.0764, 0.350, 1.463, 9.25, 102.6], rtol=0.03)
    np.testing.assert_allclose(found.held_out - found.gap, [0.0132, 0.0328, 0.0116, 0, 0, 0], rtol=0.05, atol=1e-4)
    assert found.alarm() == Alarm((0, 1, 2, 3, 4, 5), harmful=True)
    # With fewer images, sigma 2 and 1 are left to chance: the noise hides which image it is.
    alarm = gaps(network, training, images(200, seed=1)).alarm()
    assert alarm is not None and alarm.harmful and {2, 3, 4, 5} <= set(alarm.bins)


def test_the_best_network_for_the_distribution_raises_none() -> None:
    best = SPREAD**2 / (SPREAD**2 + SIGMAS.numpy() ** 2)
    np.testing.assert_allclose(losses(optimal, images(4000, seed=0)).mean(axis=1), best, rtol=0.02)
    for seed in range(20):
        assert gaps(optimal, images(16, seed=2 * seed), images(200, seed=2 * seed + 1)).alarm() is None


def test_an_image_has_its_loss_in_any_batch() -> None:
    x = images(7, seed=0)
    parts = [
        losses_at(optimal, x[a:b], first=a, sigmas=SIGMAS, levels=LEVELS, stream=Stream.HELD_OUT_NOISE)
        for a, b in ((0, 3), (3, 7))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1).double().numpy(), losses(optimal, x), rtol=1e-6, atol=0)
    assert len({round(value, 9) for value in losses(optimal, x[:1].repeat(7, 1, 1, 1))[0]}) == 7, "each has its noise"
