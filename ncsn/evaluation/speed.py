"""How fast an extractor, the search for neighbours and the classifier's training are on this machine, for planning."""

from __future__ import annotations

import math
import time
from contextlib import suppress

import numpy as np

from ncsn.evaluation.classifier import SMALL_SET, ClassifierRecipe, Labels, train_classifier
from ncsn.evaluation.extractors import Extractor, Images
from ncsn.evaluation.measure import NEIGHBOUR_IMAGES, pixel_neighbours

_TILED_BYTES = 1 << 28


def seconds_per_image(extractor: Extractor, images: Images, *, batch_size: int) -> float:
    """Of one image through the extractor: its second batch, for the first warms up."""
    batch = np.array(images[:batch_size])
    extractor.extract(batch)
    started = time.perf_counter()
    extractor.extract(batch)
    return (time.perf_counter() - started) / len(batch)


def search_seconds_per_image(images: Images) -> float:
    """Of one training image in the search for those nearest to a set of images: the second search, as above."""
    queries = np.array(images[:NEIGHBOUR_IMAGES])
    pixel_neighbours(queries, images)
    started = time.perf_counter()
    pixel_neighbours(queries, images)
    return (time.perf_counter() - started) / len(images)


def training_seconds_per_image(recipe: ClassifierRecipe, *, images: Images, labels: Labels, seconds: float) -> float:
    """Of one image of one pass over a large set, whose batches and threads are others than a small one's.

    Args:
        recipe: The classifier.
        images: Some images, [N, H, W, C] uint8; repeated until they are a large set.
        labels: [N] classes.
        seconds: How long to train, about.
    """
    tiles = min(math.ceil(SMALL_SET / len(images)), max(1, _TILED_BYTES // images.nbytes))
    ticks: list[tuple[float, int]] = []

    def watch(done: int, _total: int) -> None:
        ticks.append((time.perf_counter(), done))
        if ticks[-1][0] - ticks[0][0] > seconds:
            raise _EnoughError

    with suppress(_EnoughError):
        many = np.tile(images, (tiles, 1, 1, 1))
        train_classifier(recipe, images=many, labels=np.tile(labels, tiles), on_progress=watch)
    (first, done), (last, more) = ticks[0], ticks[-1]
    return (last - first) / max(more - done, 1)


class _EnoughError(Exception):
    """The measurement is long enough."""
