"""The U-Net's preconditioning, its layers against PyTorch's plain ones, and the shapes that it accepts."""

import pytest
import torch
from tiny_networks import random_batch, shaken, unet


def test_denoiser_is_that_of_equation_7() -> None:
    network = shaken(unet()).double()
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
    [(8, 1, (8,), ()), (9, 1, (8, 12, 20, 24), ()), (28, 1, (8, 16, 24), (7,)), (33, 3, (4, 6, 10), (9,))],
)
def test_shapes(size: int, channels: int, widths: tuple[int, ...], attention_sizes: tuple[int, ...]) -> None:
    network = shaken(unet(channels=channels, image_size=size, widths=widths, attention_sizes=attention_sizes))
    x, level = random_batch(channels=channels, size=size)
    score = network(x, level)
    assert score.shape == x.shape and score.isfinite().all()


def test_sizes_from_compact_to_large() -> None:
    large = {"channels": 3, "image_size": 64, "widths": (128, 256, 384, 384), "attention_sizes": (16, 8)}
    with torch.device("meta"):
        compact = unet(widths=(32, 64), blocks_per_resolution=2, embedding_features=128)
        network = unet(**large, blocks_per_resolution=3, embedding_features=512)
    assert sum(p.numel() for p in compact.parameters()) == 534_881
    assert sum(p.numel() for p in network.parameters()) == 60_767_875
