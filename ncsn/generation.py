"""Images from a trained network: the one place where sampler settings meet a network and a seed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn import build
from ncsn.checkpoint import TrainedNetwork
from ncsn.config.samplers import (
    AnnealedLangevinConfig,
    KarrasHeunConfig,
    LangevinConfig,
    ProbabilityFlowConfig,
    SamplerConfig,
)
from ncsn.config.schema import SamplingConfig
from ncsn.core.images import to_uint8
from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.starts import moment_matched_start

_LONGEST_CHAIN = 100_000
_START_DRAW = 2**31
"""Number of the draw that a moment-matched start takes, far beyond those of any chain."""


def generate(
    trained: TrainedNetwork,
    *,
    sampling: SamplingConfig,
    first: int,
    count: int,
    device: str | torch.device = "cpu",
    on_level: Callable[[int, Tensor], None] | None = None,
) -> NDArray[np.uint8]:
    """Images `first .. first + count` for the seed of `sampling`; image i is the same in whatever batch it is made.

    Args:
        trained: The experiment, its network on `device` and the moments of its images.
        sampling: Sampler, seed and precision.
        first: Index of the first image.
        count: Number of images, made as one batch.
        device: Where to compute.
        on_level: Receives the number of each stage and the state: 0 is the start, then one per visited level.

    Returns:
        `[count, H, W, C]` uint8.

    Raises:
        ValueError: if an image is not finite, or the sampler does not fit the network or its levels.
    """
    config = trained.config
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    noise = KeyedNoise(sampling.seed, first=first, count=count, shape=shape, device=device)
    autocast = torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=sampling.precision == "bfloat16")
    with torch.inference_mode(), autocast:
        x = start(trained, sampling.sampler, noise=noise)
        if on_level is not None:
            on_level(0, x)
        x = build.sampler(sampling.sampler)(
            trained.network,
            x=x,
            sigmas=build.sigmas(config).to(device),
            noise=noise,
            on_level=None if on_level is None else lambda level, state: on_level(level + 1, state),
        )
    broken = int((~torch.isfinite(x)).flatten(1).any(1).sum())
    if broken:
        raise ValueError(
            f"{broken} of images {first} to {first + count - 1} are not finite with sampling.sampler "
            f"{sampling.sampler.model_dump()}; lower its step size, or train longer"
        )
    return to_uint8(x).cpu().numpy()


def start(trained: TrainedNetwork, sampler: SamplerConfig, *, noise: KeyedNoise) -> Tensor:
    """Where the chain begins: uniform for Langevin dynamics, which forgets it, else data plus noise of sigma_1."""
    if isinstance(sampler, AnnealedLangevinConfig | LangevinConfig):
        return noise.uniform(0)
    return moment_matched_start(trained.moments, sigma=trained.config.levels.sigma_1, z=noise(_START_DRAW))


def evaluations_per_image(sampler: SamplerConfig, *, num_levels: int) -> int:
    """NFE of one image for a network of `num_levels` levels."""
    return build.sampler(sampler).num_evaluations(num_levels)


def with_evaluations(sampler: SamplerConfig, *, nfe: int, num_levels: int) -> SamplerConfig:
    """The sampler with a chain of another length.

    Raises:
        ValueError: if it has no length of its own, or none that takes exactly `nfe` evaluations; with the nearest.
    """
    field = {
        AnnealedLangevinConfig: "steps_per_level",
        LangevinConfig: "num_steps",
        ProbabilityFlowConfig: "num_levels",
        KarrasHeunConfig: "num_steps",
    }.get(type(sampler))
    if evaluations_per_image(sampler, num_levels=num_levels) == nfe:
        return sampler
    if field is None:
        raise ValueError(f"nfe cannot be chosen for the sampler {sampler.kind!r}")
    least = 1 if field == "steps_per_level" or isinstance(sampler, LangevinConfig) else 2
    lengths = range(least, min(num_levels if field == "num_levels" else nfe, _LONGEST_CHAIN) + 1)

    def with_length(length: int) -> SamplerConfig:
        return sampler.model_copy(update={field: length})

    def evaluations(length: int) -> int:
        return evaluations_per_image(with_length(length), num_levels=num_levels)

    index = bisect_left(lengths, nfe, key=evaluations)
    near = [evaluations(lengths[i]) for i in (index - 1, index) if 0 <= i < len(lengths)] or [evaluations(least)]
    if nfe not in near:
        nearest = " or ".join(map(str, near))
        raise ValueError(f"nfe = {nfe} cannot be reached by sampling.sampler.{field}; use {nearest}")
    return with_length(lengths[index])


def shortened(sampler: SamplerConfig, *, nfe: int, num_levels: int) -> SamplerConfig:
    """The sampler with `nfe` evaluations at most, or a plain one of about so many where it cannot be that short."""
    if evaluations_per_image(sampler, num_levels=num_levels) <= nfe:
        return sampler
    if isinstance(sampler, AnnealedLangevinConfig) and nfe > num_levels:
        return sampler.model_copy(update={"steps_per_level": (nfe - sampler.denoise) // num_levels})
    if isinstance(sampler, LangevinConfig):
        return sampler.model_copy(update={"num_steps": max(nfe - sampler.denoise, 1)})
    return ProbabilityFlowConfig(kind="probability_flow", method="euler", num_levels=max(2, min(nfe, num_levels)))
