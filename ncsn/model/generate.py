"""Images from a trained network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn.config import Config
from ncsn.config.samplers import SamplerConfig
from ncsn.config.schema import SamplingConfig
from ncsn.core.images import encode, to_uint8
from ncsn.core.keyed_random import InterpolatedNoise, KeyedNoise
from ncsn.core.samplers.langevin import inpaint
from ncsn.core.samplers.stochastic import AnnealedLangevin
from ncsn.errors import InvalidValue, UserError
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.classes import labels_of_images
from ncsn.model.guidance import guided_evaluations, score_function
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
    x = _sampled(trained, sampling, noise=noise, labels=labels, device=device, on_level=on_level)
    return finished(x, sampling, trained.config, what=f"images {first} to {first + count - 1}")


def interpolate(
    trained: TrainedNetwork,
    *,
    sampling: SamplingConfig,
    first: int,
    second: int,
    count: int,
    device: str | torch.device = "cpu",
) -> NDArray[np.uint8]:
    """Images from image `first` to image `second` of a seed, by mixing their noise (NCSNv2, interpolation).

    The first is that of `generate`, and so is the last if the start is a normal draw and both have one class: all
    images have that of `first`. A chain that starts from uniform pixels takes those of `first` for all images. They are
    uint8 `[count, H, W, C]`, of which `count` >= 2 includes both ends.
    """
    one, other = (
        KeyedNoise(sampling.seed, first=index, count=1, shape=image_shape(trained.config), device=device)
        for index in (first, second)
    )
    label = image_labels(trained, sampling, first=first, count=1)
    labels = None if label is None else label.expand(count)
    x = _sampled(trained, sampling, noise=InterpolatedNoise(one, other, count=count), labels=labels, device=device)
    return finished(x, sampling, trained.config, what=f"the images from {first} to {second}")


def complete(
    trained: TrainedNetwork,
    images: NDArray[np.uint8],
    known: NDArray[np.bool_],
    *,
    sampling: SamplingConfig,
    labels: Tensor | None = None,
    first: int = 0,
    device: str | torch.device = "cpu",
) -> NDArray[np.uint8]:
    """Fill in the unknown pixels of images (paper, Algorithm 2), as one batch.

    Args:
        images: `[N, H, W, C]` uint8; their unknown pixels are not used.
        known: `[H, W]` or `[N, H, W]`, True for a known pixel, which does not change.
        labels: Class of each image, int64 [N], for a network of classes; None for those of `generate`.
        first: Index of the first image: image i draws the noise that `generate` gives image i.

    Returns:
        `[N, H, W, C]` uint8.
    """
    config, sampler = trained.config, build.sampler(sampling.sampler)
    levels = build.sampled_sigmas(config, sampling)
    if not isinstance(sampler, AnnealedLangevin):
        raise UserError("sampling.sampler.kind", "inpainting needs annealed_langevin (Algorithm 2)", value=sampler.kind)
    height = width = config.data.image_size
    if images.shape[1:] != (height, width, config.data.channels) or images.dtype != np.uint8:
        found, needed = list(images.shape[1:]), [height, width, config.data.channels]
        raise UserError("images", f"{found} {images.dtype}, but the model's are {needed} uint8")
    if known.shape not in ((height, width), (len(images), height, width)):
        raise UserError("mask", f"{list(known.shape)}, but the model's images are {[height, width]}")
    reference = encode(torch.tensor(images), dequantized=config.data.dequantize).to(device)
    noise = KeyedNoise(sampling.seed, first=first, count=len(images), shape=reference.shape[1:], device=device)
    mask = torch.from_numpy(known).to(device)
    if labels is None:
        labels = image_labels(trained, sampling, first=first, count=len(images))
    with inference(sampling, device):
        x = inpaint(
            score_function(trained, sampling, sampler, labels=labels),
            x=noise.uniform(0),
            reference=reference,
            mask=mask if mask.ndim == 2 else mask[:, None],
            sigmas=levels.to(device),
            epsilon=sampler.epsilon,
            steps_per_level=sampler.steps_per_level,
            denoise=sampler.denoise,
            consistent=sampler.consistent,
            noise=noise,
        )
    return finished(x, sampling, config, what=f"images {first} to {first + len(images) - 1}")


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


def _sampled(
    trained: TrainedNetwork,
    sampling: SamplingConfig,
    *,
    noise: KeyedNoise | InterpolatedNoise,
    labels: Tensor | None,
    device: str | torch.device,
    on_level: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """The chain of the configured sampler from its start to its end, in the network's space."""
    config, sampler = trained.config, build.sampler(sampling.sampler)
    levels = build.sampled_sigmas(config, sampling)
    with inference(sampling, device):
        x = sampler.start(trained.moments, sigma_1=build.sampled_levels(config, sampling).sigma_1, noise=noise)
        if on_level is not None:
            on_level(0, x)
        return sampler(
            score_function(trained, sampling, sampler, labels=labels),
            x=x,
            sigmas=levels.to(device),
            noise=noise,
            on_level=None if on_level is None else lambda level, state: on_level(level + 1, state),
        )


def image_shape(config: Config) -> tuple[int, int, int]:
    """[C, H, W]."""
    return (config.data.channels, config.data.image_size, config.data.image_size)


def finished(x: Tensor, sampling: SamplingConfig, config: Config, *, what: str) -> NDArray[np.uint8]:
    """The images of a sampler's last state, uint8 `[N, H, W, C]`; `what` they are for a message."""
    if broken := int((~torch.isfinite(x)).flatten(1).any(1).sum()):
        raise UserError(
            "sampling.sampler",
            f"{broken} of {what} are not finite",
            hint="lower its step size, or train longer",
            value=sampling.sampler.model_dump(),
        )
    return _grays(x, sampling, config)


def _grays(x: Tensor, sampling: SamplingConfig, config: Config) -> NDArray[np.uint8]:
    dequantized = sampling.grays == "exact" and config.data.dequantize
    images: NDArray[np.uint8] = to_uint8(x, dequantized=dequantized).cpu().numpy()
    return images


def level_images(x: Tensor, sampling: SamplingConfig, config: Config) -> NDArray[np.uint8]:
    """The images of a state that `on_level` receives, uint8 `[N, H, W, C]`."""
    try:
        return _grays(x, sampling, config)
    except InvalidValue as error:
        raise UserError("sampling.sampler", str(error), value=sampling.sampler.model_dump()) from None


def evaluations_per_image(config: Config) -> int:
    """NFE of an image by the config's sampler, with those of the guidance."""
    return guided_evaluations(config)


def with_evaluations(section: SamplerConfig, nfe: int, *, num_levels: int, key: str = "nfe") -> SamplerConfig:
    """The sampler's section with a chain of exactly `nfe` evaluations; an error names the nearest."""
    try:
        return build.sampler_section(build.sampler(section).with_evaluations(nfe, num_levels=num_levels))
    except InvalidValue as error:
        raise UserError(key, str(error), value=nfe) from None
