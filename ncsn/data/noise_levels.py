"""The noise levels that fit a dataset: the sample they are found by, what ingest suggests, and `noise: auto`."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ncsn.config import Config, from_yaml
from ncsn.config.training import AutoNoiseConfig
from ncsn.core.images import BYTE, Limits, to_unit
from ncsn.core.noise_schedule import largest_distance, suggest_noise
from ncsn.data.format import Manifest
from ncsn.errors import UserError

MOST_IMAGES = 60_000
_MOST_BYTES = MOST_IMAGES * 32 * 32 * 3  # of the images that are kept for the largest distance
_MOST_WORK = 2e11  # multiplications for the largest distance: some seconds on two CPU cores; real images need a tenth


def sample_places(count: int, image_bytes: int) -> NDArray[np.int64]:
    """A random choice of the places 0 .. count, ascending: at most `MOST_IMAGES`, fewer of large images."""
    size = max(2, min(MOST_IMAGES, _MOST_BYTES // image_bytes))
    if count <= size:
        return np.arange(count)
    generator = np.random.Generator(np.random.Philox(0))
    return np.sort(generator.choice(count, size, replace=False, shuffle=False))


def suggestions(sample: NDArray[Any], limits: Limits = BYTE) -> dict[str, dict[str, Any]]:
    """What levels are chosen by, of the images (`plain`) and with mirrored ones (`mirrored`); none if all are alike.

    `sample` [N, H, W, C] is stored images. Each result has the largest of the `distances` between images, in pixel
    units of [0, 1].
    """
    images = torch.from_numpy(sample)
    if images.dtype != torch.uint8:  # which takes less memory as it is
        images = to_unit(images, limits)
    found = {}
    for name, flips in (("plain", False), ("mirrored", True)):
        maximum = largest_distance(images, flips=flips, most_work=_MOST_WORK)
        if maximum <= AutoNoiseConfig(kind="auto").sigma_L:
            return {}
        found[name] = {"distances": {"maximum": maximum}}
    return found


def resolve_noise(config: Config, manifest: Manifest) -> Config:
    """The config with the levels that `noise: auto` stands for; any other config as it is."""
    noise = config.noise
    if not isinstance(noise, AutoNoiseConfig):
        return config
    if not manifest.suggested_noise:
        reason = f"finds no levels: the images of {manifest.name}/{manifest.digest} are all alike"
        raise UserError("noise", reason, hint="give noise.sigma_1, noise.sigma_L and noise.num_levels", value="auto")
    suggested = manifest.suggested_noise["mirrored" if config.data.horizontal_flip else "plain"]
    largest, dimension = suggested["distances"]["maximum"], math.prod(manifest.pixels.shape)
    sigma_1, num_levels = suggest_noise(largest, dimension=dimension, sigma_L=noise.sigma_L)
    section = {"sigma_1": sigma_1, "sigma_L": noise.sigma_L, "num_levels": num_levels}
    training = noise.training.model_dump(mode="json")
    tree = config.model_dump(mode="json") | {"noise": {**section, "training": training}}
    return from_yaml(json.dumps(tree), origin="the config with the levels of noise: auto")
