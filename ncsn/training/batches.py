"""Batches: images in the network's space and their noise, each a function of its place."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from ncsn import storage
from ncsn.config import Config
from ncsn.core.augmentation import Transforms, augmentation_labels, draw_transforms
from ncsn.core.images import DataMoments, dequantize, fit_moments, mirror, to_unit
from ncsn.core.keyed_random import COMMON_SEED, Stream, keyed_normal, keyed_uniform
from ncsn.core.losses import Batch
from ncsn.data.format import Manifest
from ncsn.data.training_images import TrainingImages
from ncsn.model import build
from ncsn.model.checkpoint import moment_tensors, moments_of
from ncsn.model.classes import Classes

MOMENT_IMAGES = 10_000


def draw_batch(config: Config, split: TrainingImages, *, first: int, count: int) -> Batch:
    """The images at places `first .. first + count` of the endless shuffled order, with their draws.

    Augmentation, which is cheap on a GPU, is left to `Batch.augmented`; its numbers are drawn.
    """
    seed = config.seed
    drawn = split.ordered(seed, first=first, count=count)
    x = encoded(config, torch.from_numpy(drawn.images), seed=seed, stream=Stream.DEQUANTIZE, first=first)
    size = x[0].numel()
    if config.data.horizontal_flip:
        x = mirror(x, keyed_uniform(seed, stream=Stream.MIRROR, first=first, count=count, size=1)[:, 0] < 0.5)
    sigma, level = build.training_noise(config).draw(seed, first=first, count=count)
    z = keyed_normal(seed, stream=Stream.NOISE, first=first, count=count, size=size).view_as(x)
    v, projections = None, build.loss(config).num_projections
    if projections:
        rows = keyed_normal(seed, stream=Stream.PROJECTION, first=first, count=count, size=projections * size)
        v = rows.view(count, projections, *x.shape[1:]).transpose(0, 1).contiguous()
    conditions, transforms = {}, None
    if config.data.num_classes is not None:
        # Without its class for some images, the network learns the distribution of all too (Ho & Salimans 2022).
        hidden = keyed_uniform(seed, stream=Stream.LABEL, first=first, count=count, size=1)[:, 0]
        conditions["labels"] = torch.where(hidden < config.train.label_dropout, -1, torch.from_numpy(drawn.labels))
    if settings := config.data.augmentation:
        a = draw_transforms(seed, first=first, count=count, probability=settings.probability, y_flip=settings.y_flip)
        conditions["augmentation"] = augmentation_labels(a)
        transforms = Transforms.of(a, height=x.shape[2], width=x.shape[3])
    return Batch(x=x, sigma=sigma, z=z, level=level, v=v, conditions=conditions, transforms=transforms)


def image_moments(config: Config, dataset: str, split: TrainingImages) -> DataMoments:
    """Mean and covariance of the first `MOMENT_IMAGES` images in the network's space; the dataset's folder keeps it."""
    uri = storage.join(dataset, "moments", f"{'dequantized' if config.data.dequantize else 'plain'}.safetensors")
    if storage.exists(uri):
        return moments_of(load(storage.read_bytes(uri)))
    images = torch.from_numpy(split.rows(np.arange(min(MOMENT_IMAGES, len(split)))).images)
    moments = fit_moments(encoded(config, images, seed=COMMON_SEED, stream=Stream.DEQUANTIZE, first=0))
    with suppress(OSError):  # of a dataset that may only be read
        storage.publish_once(uri, save(moment_tensors(moments)))
    return moments


def encoded(config: Config, images: Tensor, *, seed: int, stream: int, first: int) -> Tensor:
    """Stored images [N, H, W, C] in the network's space, dequantized by rows `first .. first + N` of the stream."""
    count, height, width, channels = images.shape
    limits = config.data.pixels.limits
    if not config.data.dequantize or images.is_floating_point():
        return to_unit(images, limits)
    size = height * width * channels
    u = keyed_uniform(seed, stream=stream, first=first, count=count, size=size)
    return dequantize(images, u.view(count, channels, height, width), limits)


def classes_of(config: Config, manifest: Manifest) -> Classes | None:
    """The classes that the network learns from this dataset; None if it learns none."""
    if config.data.num_classes is None:
        return None
    return Classes(tuple(manifest.class_names), tuple(manifest.class_counts["train"]))
