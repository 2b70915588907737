"""Noise levels and step size for some images, without a run: what `ncsn suggest-noise` answers."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import torch

from ncsn.config.schema import DataConfig
from ncsn.core.images import PixelSpace
from ncsn.core.keyed_random import Stream, keyed_uniform
from ncsn.core.noise_schedule import NoiseSuggestion, pair_distances, suggest_noise
from ncsn.data.format import load_manifest
from ncsn.data.parquet import read_blocks
from ncsn.data.sources import open_source
from ncsn.data.statistics import ImageSample

UNIT = PixelSpace()
MOST_IMAGES = 60_000
_MOST_VALUES = 2**31
"""Bytes of the images that are kept for it."""
_BLOCK = 1024


def images_of_dataset(uri: str) -> ImageSample:
    """The train split of an ingested data set: all of up to 60,000 images (fewer where they are large), or a sample."""
    sample = _empty_sample(math.prod(load_manifest(uri).shape))
    for rows in read_blocks(uri, "train"):
        sample.update(rows.images)
    return sample


def images_of_source(data: DataConfig) -> ImageSample:
    """The train split of a source that need not be ingested, otherwise like `images_of_dataset`."""
    sample = _empty_sample(data.image_size**2 * data.channels)
    examples = open_source(data).splits["train"].stream()
    while block := list(itertools.islice(examples, _BLOCK)):
        sample.update(np.stack([example.image for example in block]))
    return sample


def run(
    sample: ImageSample,
    *,
    mirrored: bool,
    sigma_L: float,
    overlap: float,
    steps_per_level: int,
    space: PixelSpace = UNIT,
) -> NoiseSuggestion:
    """Apply techniques 1, 2 and 4 of NCSNv2.

    Args:
        sample: The images.
        mirrored: Whether training mirrors images.
        sigma_L: Smallest sigma.
        overlap: C of neighbouring levels.
        steps_per_level: T, the Langevin steps per level that sampling can afford.
        space: Where the network sees the images.

    Raises:
        UserError: if there are fewer than two images, or they are all alike.
    """
    images = torch.from_numpy(sample.images)
    if space.logit:
        count, height, width, channels = images.shape
        u = keyed_uniform(0, stream=Stream.DEQUANTIZE, first=0, count=count, size=height * width * channels)
        images = space.encode(images, u.view(count, channels, height, width))
    distances = replace(pair_distances(images, flips=mirrored), exact=sample.complete)
    return suggest_noise(
        distances, dimension=images[0].numel(), sigma_L=sigma_L, overlap=overlap, steps_per_level=steps_per_level
    )


def _empty_sample(values_per_image: int) -> ImageSample:
    return ImageSample(max(2, min(MOST_IMAGES, _MOST_VALUES // values_per_image)))
