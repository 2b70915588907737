"""The noise levels that fit a dataset: the sample they are found by, what ingest suggests, and `noise: auto`."""

from __future__ import annotations

import heapq
import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from ncsn.config import Config, from_yaml
from ncsn.config.training import AutoNoiseConfig
from ncsn.core.images import BYTE, Limits, to_unit
from ncsn.core.keyed_random import Stream, keyed_permutation, keyed_uniform
from ncsn.core.noise_schedule import distance_quantile, largest_distance, suggest_noise
from ncsn.data.format import Manifest
from ncsn.errors import UserError

MOST_IMAGES = 60_000
_MOST_BYTES = MOST_IMAGES * 32 * 32 * 3  # of the images that are kept for the largest distance
_MOST_WORK = 2e11  # multiplications for the largest distance: some seconds on two CPU cores; real images need a tenth
_FEW, _FEW_WORK = 2_000, 6e9  # images compared in pairs for the percentile, and multiplications that this may take


class ImageSample:
    """A random sample of at most `size` images of a stream, fewer large ones; a function of their order alone."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self._places: list[tuple[float, int, int]] = []  # minus an image's random number, its index, its row below
        self._rows: np.ndarray = np.empty(0, np.uint8)

    def update(self, images: np.ndarray) -> None:
        """Offer stored images [N, H, W, C]."""
        if not self.count:
            self.size = max(2, min(self.size, _MOST_BYTES // images[0].nbytes))
            self._rows = np.empty((self.size, *images.shape[1:]), images.dtype)  # takes memory where it is written
        # Each image has a random number; those with the smallest stay.
        keys = keyed_uniform(0, stream=Stream.SUBSET, first=self.count, count=len(images), size=1)[:, 0].numpy()
        full = len(self._places) == self.size
        # Once the sample is full, few images still have a chance.
        for index in np.flatnonzero(keys < -self._places[0][0]) if full else range(len(keys)):
            key, number, row = -float(keys[index]), self.count + int(index), len(self._places)
            if row < self.size:
                heapq.heappush(self._places, (key, number, row))
            elif key > self._places[0][0]:
                row = self._places[0][2]
                heapq.heapreplace(self._places, (key, number, row))
            else:
                continue
            self._rows[row] = images[index]
        self.count += len(images)

    @property
    def images(self) -> np.ndarray:
        """The sample, [N, H, W, C], not in the stream's order."""
        return self._rows[: len(self._places)]

    def some(self, count: int) -> np.ndarray:
        """At most `count` of the images, a random choice in the stream's order."""
        rows = np.array([row for _, _, row in sorted(self._places, key=lambda place: place[1])], np.int64)
        chosen: np.ndarray = self._rows[rows[np.sort(keyed_permutation(0, epoch=0, size=len(rows))[:count])]]
        return chosen


def suggestions(sample: ImageSample, limits: Limits = BYTE) -> dict[str, dict[str, Any]]:
    """Noise levels for the images as they are (`plain`) and with mirrored ones (`mirrored`); none if all are alike.

    Each is a `NoiseSuggestion` as plain values, with the `distances` between images, in pixel units of [0, 1].
    """
    images = torch.from_numpy(sample.images)
    few = torch.from_numpy(sample.some(max(2, min(_FEW, math.isqrt(int(_FEW_WORK / images[0].numel()))))))
    if images.dtype != torch.uint8:  # which takes less memory as it is
        images, few = to_unit(images, limits), to_unit(few, limits)
    found = {}
    for name, flips in (("plain", False), ("mirrored", True)):
        maximum, exact = largest_distance(images, flips=flips, most_work=_MOST_WORK)
        if maximum <= AutoNoiseConfig(kind="auto").sigma_L:
            return {}
        distances = {
            "maximum": maximum,
            # Perhaps of fewer images; it shows whether outliers make the maximum.
            "quantile_999": distance_quantile(few, 0.999, flips=flips),
            "num_images": len(images),  # compared for the maximum
            "exact": exact and sample.count == len(images),  # whether these were all images and not a sample
        }
        found[name] = asdict(suggest_noise(maximum, dimension=images[0].numel())) | {"distances": distances}
    return found


def resolve_noise(config: Config, manifest: Manifest) -> Config:
    """The config with the levels that `noise: auto` stands for; any other config as it is."""
    noise = config.noise
    if not isinstance(noise, AutoNoiseConfig):
        return config
    if not manifest.suggested_noise:
        raise UserError(
            "noise",
            f"finds no levels: the images of {manifest.name}/{manifest.digest} are all alike",
            hint="give noise.sigma_1, noise.sigma_L and noise.num_levels",
            value="auto",
        )
    suggested = manifest.suggested_noise["mirrored" if config.data.horizontal_flip else "plain"]
    largest, dimension = suggested["distances"]["maximum"], math.prod(manifest.shape)
    chosen = suggest_noise(largest, dimension=dimension, sigma_L=noise.sigma_L)
    levels = {name: getattr(chosen, name) for name in ("sigma_1", "sigma_L", "num_levels")}
    section = {**levels, "training": noise.training.model_dump(mode="json")}
    tree = config.model_dump(mode="json") | {"noise": section}
    return from_yaml(json.dumps(tree), origin="the config with the levels of noise: auto")
