"""Score networks of a few thousand weights for 8 x 8 gray images, a config of one, and the moments of such images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ncsn.config import Config, from_yaml
from ncsn.core.images import fit_moments
from ncsn.core.networks.ddpmpp import DdpmppNetwork
from ncsn.core.networks.unet import UnetNetwork

CONFIG = """
name: tiny
data: {source: sklearn_digits, image_size: 8, channels: 1}
noise: {num_levels: 4}
network: {kind: unet, widths: [8, 8], blocks_per_resolution: 1, embedding_features: 8}
train: {batch_size: 8, num_images: 16, checkpoint_every_images: 8, report_every_images: 8}
sampling: {num_images: 20, sampler: {kind: annealed_langevin, steps_per_level: 1}}
"""
MOMENTS = fit_moments(torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), num_components=4)
SIGMAS = torch.logspace(0, -2, 10)
BOTH = {
    "channels": 1,
    "image_size": 8,
    "sigmas": SIGMAS,
    "blocks_per_resolution": 1,
    "dropout": 0.0,
    "sigma_data": 0.25,
}


def tiny_config(*overrides: str) -> Config:
    return from_yaml(CONFIG, overrides=overrides)


def unet(**changes: Any) -> UnetNetwork:
    return UnetNetwork(**(BOTH | {"widths": (8, 16), "embedding_features": 16, "attention_sizes": ()} | changes))


def ddpmpp(**changes: Any) -> DdpmppNetwork:
    settings = {"base_width": 16, "multipliers": (1, 2), "embedding_multiplier": 4, "attention_sizes": (8,)}
    return DdpmppNetwork(**(BOTH | settings | changes))


def shaken(network: Any, *, seed: int = 0) -> Any:
    """Not at its start, where most of a network has no influence yet."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return network


def random_batch(*, channels: int = 1, size: int = 8) -> tuple[Tensor, Tensor]:
    x = torch.rand(6, channels, size, size, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(6) % len(SIGMAS)
