"""Batches: images in the network's space and their noise, each a function of its place."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from ncsn import storage
from ncsn.config import Config
from ncsn.core.images import DataMoments, fit_moments, mirror, to_unit
from ncsn.core.keyed_random import (
    COMMON_SEED,
    NORMAL,
    UNIFORM,
    Stream,
    keyed_uniform,
    normal_of,
    random_words,
    to_device,
    uniform_of,
)
from ncsn.core.losses import Batch
from ncsn.data.format import Manifest
from ncsn.data.training_images import TrainingImages
from ncsn.model import build
from ncsn.model.checkpoint import moment_tensors, moments_of
from ncsn.model.classes import Classes
from ncsn.model.objective import Objective

if TYPE_CHECKING:
    from ncsn.core.augmentation import Transforms

MOMENT_IMAGES = 10_000


@dataclass(frozen=True)
class DrawnBatch:
    """Stored images and the random bits of a batch. What is computed of them waits for the device that trains."""

    images: Tensor  # stored [B, H, W, C]
    gray: Tensor | None  # bits of dequantization
    mirrored: Tensor | None  # bool [B]
    sigma: Tensor  # [B]
    level: Tensor | None  # [B]
    lower: Tensor | None  # [B]
    noise: Tensor  # bits
    projection: Tensor | None  # bits
    conditions: dict[str, Tensor]
    transforms: Transforms | None

    def on(self, device: torch.device, config: Config) -> Batch:
        """The batch on the device. Nothing here waits for a GPU."""
        moved = partial(to_device, device=device)
        x = encoded(config, moved(self.images), None if self.gray is None else moved(self.gray))
        if self.mirrored is not None:
            x = mirror(x, moved(self.mirrored))
        if (here := self.transforms) is not None:
            x = replace(here, flips=moved(here.flips), rows=moved(here.rows), maps=moved(here.maps)).apply(x)
        size, order = x[0].numel(), build.memory_format(config)
        return Batch(
            x.contiguous(memory_format=order),
            moved(self.sigma),
            normal_of(moved(self.noise), size).view(x.shape).contiguous(memory_format=order),
            None if self.level is None else moved(self.level),
            None if self.projection is None else normal_of(moved(self.projection), size).view(x.shape),
            {name: moved(values) for name, values in self.conditions.items()},
            None if self.lower is None else moved(self.lower),
        )


def draw_batch(config: Config, objective: Objective, split: TrainingImages, *, first: int, count: int) -> DrawnBatch:
    """The images at places `first .. first + count` of the endless shuffled order, with their draws."""
    seed, drawn = config.seed, split.ordered(config.seed, first=first, count=count)
    images, pairs = torch.from_numpy(drawn.images), objective.pairs
    _, height, width, _ = images.shape
    mirrored, conditions, transforms = None, {}, None
    if config.data.horizontal_flip:
        mirrored = keyed_uniform(seed, stream=Stream.MIRROR, first=first, count=count, size=1)[:, 0] < 0.5
    sigma, level = objective.noise.draw(seed, first=first, count=count)
    if config.data.num_classes is not None:
        # Without its class for some images, the network learns the distribution of all too (Ho & Salimans 2022).
        hidden = keyed_uniform(seed, stream=Stream.LABEL, first=first, count=count, size=1)[:, 0]
        conditions["labels"] = torch.where(hidden < config.train.label_dropout, -1, torch.from_numpy(drawn.labels))
    if settings := config.data.augmentation:
        from ncsn.core.augmentation import Transforms, augmentation_labels, draw_transforms

        a = draw_transforms(seed, first=first, count=count, probability=settings.probability, y_flip=settings.y_flip)
        conditions["augmentation"] = augmentation_labels(a)
        transforms = Transforms.of(a, height=height, width=width)
    words = partial(random_words, seed, kind=NORMAL, first=first, count=count, size=images[0].numel())
    return DrawnBatch(
        images,
        gray_words(config, images, seed=seed, stream=Stream.DEQUANTIZE, first=first),
        mirrored,
        sigma,
        level,
        None if pairs is None else pairs.lower(sigma, first=first),
        words(stream=Stream.NOISE),
        words(stream=Stream.PROJECTION) if objective.projects else None,
        conditions,
        transforms,
    )


def image_moments(config: Config, dataset: str, split: TrainingImages) -> DataMoments:
    """Mean and covariance of the first `MOMENT_IMAGES` images in the network's space; the dataset's folder keeps it."""
    uri = storage.join(dataset, "moments", f"{'dequantized' if config.data.dequantize else 'plain'}.safetensors")
    if storage.exists(uri):
        return moments_of(load(storage.read_bytes(uri)))
    images = torch.from_numpy(split.rows(np.arange(min(MOMENT_IMAGES, len(split)))).images)
    gray = gray_words(config, images, seed=COMMON_SEED, stream=Stream.DEQUANTIZE, first=0)
    moments = fit_moments(encoded(config, images, gray))
    with suppress(OSError):  # of a dataset that may only be read
        storage.publish_once(uri, save(moment_tensors(moments)))
    return moments


def gray_words(config: Config, images: Tensor, *, seed: int, stream: int, first: int) -> Tensor | None:
    """The bits that dequantize images [N, H, W, C], rows `first .. first + N` of the stream; None if nothing does."""
    if not config.data.dequantize or images.is_floating_point():
        return None
    return random_words(seed, kind=UNIFORM, stream=stream, first=first, count=len(images), size=images[0].numel())


def encoded(config: Config, images: Tensor, words: Tensor | None) -> Tensor:
    """Stored images [N, H, W, C] in the network's space, dequantized by their `gray_words`."""
    count, height, width, channels = images.shape
    u = None if words is None else uniform_of(words, images[0].numel()).view(count, channels, height, width)
    return to_unit(images, config.data.pixels.limits, u=u)


def classes_of(config: Config, manifest: Manifest) -> Classes | None:
    """The classes that the network learns from this dataset; None if it learns none."""
    if config.data.num_classes is None:
        return None
    return Classes(tuple(manifest.class_names), tuple(manifest.class_counts["train"]))
