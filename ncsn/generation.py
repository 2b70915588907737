"""Images from a trained network: the one place where sampler settings meet a network and a seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ncsn import build
from ncsn.config import Config
from ncsn.config.schema import SamplingConfig
from ncsn.core.images import to_uint8
from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.langevin import annealed_langevin


def generate(
    network: nn.Module,
    *,
    config: Config,
    sampling: SamplingConfig,
    first: int,
    count: int,
    device: str | torch.device = "cpu",
    on_level: Callable[[int, Tensor], None] | None = None,
) -> NDArray[np.uint8]:
    """Images `first .. first + count` for the seed of `sampling`; image i is the same in whatever batch it is made.

    Args:
        network: The score network with EMA weights, in eval mode, on `device`.
        config: The experiment that was trained: image shape and noise levels.
        sampling: Sampler and seed.
        first: Index of the first image.
        count: Number of images, made as one batch.
        device: Where to compute.
        on_level: See `annealed_langevin`.

    Returns:
        `[count, H, W, C]` uint8.

    Raises:
        ValueError: if an image is not finite.
    """
    data, sampler = config.data, sampling.sampler
    shape = (data.channels, data.image_size, data.image_size)
    noise = KeyedNoise(sampling.seed, first=first, count=count, shape=shape, device=device)
    with torch.inference_mode():
        x = annealed_langevin(
            network,
            x=noise.uniform(0),
            sigmas=build.sigmas(config).to(device),
            epsilon=sampler.epsilon,
            steps_per_level=sampler.steps_per_level,
            noise=noise,
            denoise=sampler.denoise,
            on_level=on_level,
        )
    broken = int((~torch.isfinite(x)).flatten(1).any(1).sum())
    if broken:
        raise ValueError(
            f"{broken} of images {first} to {first + count - 1} are not finite with sampling.sampler.epsilon = "
            f"{sampler.epsilon:g}; lower epsilon, or train longer"
        )
    return to_uint8(x).cpu().numpy()
