"""The held-out loss, on images of known distribution."""

from __future__ import annotations

import numpy as np
import torch

from ncsn.core.keyed_random import Stream
from ncsn.core.losses import losses_at

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


def test_a_memorizer_of_16_images_has_the_losses_of_the_nearest_image() -> None:
    """Loss of training images at sigma 2 ... 0.03, and of others, whose nearest image is the wrong one."""
    training = images(16, seed=0)
    network = Memorizer(training)
    held_out = losses(network, images(4000, seed=1)).mean(axis=1)
    np.testing.assert_allclose(held_out, [0.0173, 0.0764, 0.350, 1.463, 9.25, 102.6], rtol=0.03)
    trained = losses(network, training.repeat(250, 1, 1, 1), stream=Stream.TRAINED_NOISE).mean(axis=1)
    np.testing.assert_allclose(trained, [0.0132, 0.0328, 0.0116, 0, 0, 0], rtol=0.05, atol=1e-4)


def test_the_best_network_for_the_distribution_has_its_loss() -> None:
    best = SPREAD**2 / (SPREAD**2 + SIGMAS.numpy() ** 2)
    np.testing.assert_allclose(losses(optimal, images(4000, seed=0)).mean(axis=1), best, rtol=0.02)


def test_an_image_has_its_loss_in_any_batch() -> None:
    x = images(7, seed=0)
    parts = [
        losses_at(optimal, x[a:b], first=a, sigmas=SIGMAS, levels=LEVELS, stream=Stream.HELD_OUT_NOISE)
        for a, b in ((0, 3), (3, 7))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1).double().numpy(), losses(optimal, x), rtol=1e-6, atol=0)
    assert len({round(value, 9) for value in losses(optimal, x[:1].repeat(7, 1, 1, 1))[0]}) == 7, "each has its noise"
