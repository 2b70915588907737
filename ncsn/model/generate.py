"""Images from a trained network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn.config import Config
from ncsn.config.schema import SamplingConfig
from ncsn.core.images import to_uint8
from ncsn.core.keyed_random import InterpolatedNoise, KeyedNoise
from ncsn.core.samplers.chain import sample, start
from ncsn.errors import InvalidValue, UserError
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.classes import labels_of_images
from ncsn.model.guidance import score_function
from ncsn.process import keep_freed_memory


def generate(
    trained: TrainedNetwork,
    *,
    sampling: SamplingConfig,
    first: int,
    count: int,
    device: str | torch.device = "cpu",
    on_level: Callable[[int, Tensor], None] | None = None,
) -> NDArray[np.uint8]:
    """Images `first .. first + count` of the seed as one batch, uint8 `[count, H, W, C]`; the same in any batch.

    Args:
        trained: Its network is on `device`.
        on_level: Receives the number of each stage and the state as pixels around [0, 1]: 0 is the start, then one per
            visited level.

    Raises:
        UserError: An image is not finite.
    """
    noise = KeyedNoise(sampling.seed, first=first, count=count, shape=image_shape(trained.config), device=device)
    labels = image_labels(trained, sampling, first=first, count=count)
    x = sampled(trained, sampling, noise=noise, labels=labels, device=device, on_level=on_level)
    if broken := int((~torch.isfinite(x)).flatten(1).any(1).sum()):
        raise UserError(
            "sampling.sampler",
            f"{broken} of images {first} to {first + count - 1} are not finite",
            hint="lower its step size, or train longer",
            value=asdict(sampling.sampler),
        )
    return level_images(x, sampling, trained.config)


def sampled(
    trained: TrainedNetwork,
    sampling: SamplingConfig,
    *,
    noise: KeyedNoise | InterpolatedNoise,
    labels: Tensor | None,
    device: str | torch.device = "cpu",
    on_level: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """The chain of the configured sampler from its start to its end, [B, C, H, W] with pixels around [0, 1]."""
    config, sampler = trained.config, sampling.sampler
    levels = build.sampled_levels(config, sampling)
    with inference(sampling, device):
        x = start(sampler, trained.moments, sigma_1=levels.sigma_1, noise=noise)
        if on_level is not None:
            on_level(0, x)
        return sample(
            sampler,
            score_function(trained, sampling, labels=labels),
            x=x,
            sigmas=build.sampled_sigmas(config, sampling).to(device),
            noise=noise,
            on_level=None if on_level is None else lambda level, state: on_level(level + 1, state),
        )


def image_labels(trained: TrainedNetwork, sampling: SamplingConfig, *, first: int, count: int) -> Tensor | None:
    """Classes of images `first .. first + count` of the seed, int64 [count]; None for a network without classes."""
    num_classes = trained.config.data.num_classes
    if num_classes is None:
        return None
    return labels_of_images(
        sampling.label, num_classes=num_classes, classes=trained.classes, seed=sampling.seed, first=first, count=count
    )


@contextmanager
def inference(sampling: SamplingConfig, device: str | torch.device, *, derivatives: bool = False) -> Iterator[None]:
    """Evaluate networks in the precision of the settings; `derivatives` may be enabled inside."""
    kind, bfloat16 = torch.device(device).type, sampling.precision == "bfloat16"
    if kind == "cpu":
        keep_freed_memory()
    mode = torch.no_grad() if derivatives else torch.inference_mode()
    with mode, torch.autocast(kind, dtype=torch.bfloat16, enabled=bfloat16):
        yield


def image_shape(config: Config) -> tuple[int, int, int]:
    """[C, H, W]."""
    return (config.data.channels, config.data.image_size, config.data.image_size)


def level_images(x: Tensor, sampling: SamplingConfig, config: Config) -> NDArray[np.uint8]:
    """The images of a state, uint8 `[N, H, W, C]`."""
    dequantized = sampling.grays == "exact" and config.data.dequantize
    try:
        images: NDArray[np.uint8] = to_uint8(x, dequantized=dequantized).cpu().numpy()
    except InvalidValue as error:
        raise UserError("sampling.sampler", str(error), value=asdict(sampling.sampler)) from None
    return images
