"""Before a training: noise levels suggested for a dataset, and checkpoints that the authors released."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import torch

from ncsn.config.schema import DataConfig
from ncsn.core.images import to_unit
from ncsn.core.noise_schedule import NoiseSuggestion, pair_distances, suggest_noise
from ncsn.data.format import load_manifest
from ncsn.data.parquet import read_blocks
from ncsn.data.sources.base import BadImages
from ncsn.data.sources.known import open_source
from ncsn.data.statistics import ImageSample

MOST_IMAGES = 60_000
_MOST_VALUES = 2**31  # uint8 of all images
_BLOCK = 1024
_SIGMA_TOLERANCE = 1e-4


def images_of_dataset(uri: str) -> ImageSample:
    """The train split of an ingested dataset, or a sample of 60,000 images (fewer if they are large)."""
    sample = _empty_sample(math.prod(load_manifest(uri).shape))
    for rows in read_blocks(uri, "train"):
        sample.update(rows.images)
    return sample


def images_of_source(data: DataConfig) -> ImageSample:
    """The same of a source that is not ingested."""
    sample = _empty_sample(data.image_size**2 * data.channels)
    examples = BadImages(skip=data.on_bad_image == "skip").filter(open_source(data).splits["train"].stream())
    while block := list(itertools.islice(examples, _BLOCK)):
        sample.update(np.stack([example.image for example in block]))
    return sample


def suggest_levels(
    sample: ImageSample,
    *,
    mirrored: bool,  # by training
    sigma_L: float,
    overlap: float,  # C of neighboring levels
    steps_per_level: int,  # T, which sampling can afford
) -> NoiseSuggestion:
    """Apply techniques 1, 2 and 4 of NCSNv2 to at least two different images, as the network sees them."""
    images = torch.from_numpy(sample.images)
    distances = replace(pair_distances(images, flips=mirrored), exact=sample.complete)
    return suggest_noise(
        distances, dimension=images[0].numel(), sigma_L=sigma_L, overlap=overlap, steps_per_level=steps_per_level
    )


def spread_around_gray(sample: ImageSample) -> float:
    """Root mean square of the pixels around mid-gray, which is the `network.sigma_data` for these images."""
    images, total = sample.images, 0.0
    for first in range(0, len(images), _BLOCK):
        block = to_unit(torch.from_numpy(images[first : first + _BLOCK]))
        total += float((block.double() - 0.5).square().sum())
    return math.sqrt(total / images.size)


def _empty_sample(values_per_image: int) -> ImageSample:
    return ImageSample(max(2, min(MOST_IMAGES, _MOST_VALUES // values_per_image)))
