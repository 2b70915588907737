"""The U-Net's preconditioning, its layers against PyTorch's plain ones, and the shapes that it accepts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ncsn.core.networks.unet import UnetNetwork

SIGMAS = torch.logspace(0, -2, 10)


def make_network(**changes: Any) -> UnetNetwork:
    settings: dict[str, Any] = {
        "channels": 1,
        "image_size": 8,
        "sigmas": SIGMAS,
        "widths": (8, 16),
        "blocks_per_resolution": 1,
        "embedding_features": 16,
        "attention_sizes": (),
        "dropout": 0.0,
        "sigma_data": 0.25,
    }
    return UnetNetwork(**(settings | changes))


def randomize(network: nn.Module, *, seed: int = 0) -> None:
    """Replaces the zero start, with which most of the network has no influence yet."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def random_batch(*, batch: int = 6, channels: int = 1, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch, channels, size, size, generator=generator)
    return x, torch.arange(batch) % len(SIGMAS)


def test_fresh_network_is_the_score_of_a_gaussian_around_mid_gray() -> None:
    x, _ = random_batch()
    sigma = torch.tensor([3.0, 1.0, 0.3, 0.1, 0.03, 0.001])
    expected = -(x - 0.5) / (sigma.square() + 0.25**2)[:, None, None, None]
    torch.testing.assert_close(make_network().score_at(x, sigma), expected, rtol=1e-5, atol=1e-5)


def test_denoiser_is_that_of_equation_7() -> None:
    network = make_network().double()
    randomize(network)
    x = random_batch()[0].double()
    sigma = torch.tensor([3.0, 1.0, 0.3, 0.1, 0.03, 0.01], dtype=torch.float64)
    sd, sigma2x = 0.5, (2 * sigma)[:, None, None, None]
    x2x = 2 * x - 1
    c_skip = sd**2 / (sigma2x**2 + sd**2)
    c_out = sigma2x * sd / (sigma2x**2 + sd**2).sqrt()
    c_in = 1 / (sigma2x**2 + sd**2).sqrt()
    denoised2x = c_skip * x2x + c_out * network._raw(c_in * x2x, sigma2x.flatten().log() / 4)
    score = ((denoised2x + 1) / 2 - x) / sigma.square()[:, None, None, None]
    torch.testing.assert_close(network.score_at(x, sigma), score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("size", "channels", "widths", "attention_sizes"),
    [
        (8, 1, (8,), ()),
        (8, 3, (8, 16), (4, 8)),
        (9, 1, (8, 12, 20, 24), ()),
        (28, 1, (8, 16, 24), (7,)),
        (33, 3, (4, 6, 10), (9,)),
    ],
)
def test_shapes(size: int, channels: int, widths: tuple[int, ...], attention_sizes: tuple[int, ...]) -> None:
    network = make_network(channels=channels, image_size=size, widths=widths, attention_sizes=attention_sizes)
    randomize(network)
    x, level = random_batch(channels=channels, size=size)
    score = network(x, level)
    assert score.shape == x.shape
    assert score.isfinite().all()


def test_sizes_from_compact_to_large() -> None:
    with torch.device("meta"):
        compact = make_network(widths=(32, 64), blocks_per_resolution=2, embedding_features=128)
        large = make_network(
            channels=3,
            image_size=64,
            widths=(128, 256, 384, 384),
            blocks_per_resolution=3,
            embedding_features=512,
            attention_sizes=(16, 8),
        )
    assert sum(p.numel() for p in compact.parameters()) == 534_881
    assert sum(p.numel() for p in large.parameters()) == 60_767_875
