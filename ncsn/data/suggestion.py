"""Noise levels chosen from a data set's images (NCSNv2, techniques 1, 2 and 4)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ncsn.config import Config, from_yaml
from ncsn.config.choices import AutoNoiseConfig
from ncsn.core.keyed_random import keyed_permutation
from ncsn.core.noise_schedule import (
    NoiseSuggestion,
    PairDistances,
    largest_distance,
    pair_distances,
    suggest_noise,
)
from ncsn.data.manifest import Manifest
from ncsn.data.statistics import ImageSample
from ncsn.errors import UserError

MOST_IMAGES = 60_000
_MOST_VALUES = 2**28
"""Bytes of the images that are kept for the largest distance."""
_MOST_WORK = 2e11
"""Multiplications for it: some seconds on two CPU cores. Real images take a tenth, pure noise would take all."""
_FEW, _FEW_WORK = 2_000, 2.5e10
"""Images all pairs of which are compared for the percentile, and multiplications that this may take."""


def sample_size(values_per_image: int) -> int:
    """How many images ingest keeps to compare them: 60,000, fewer where they are large."""
    return max(2, min(MOST_IMAGES, _MOST_VALUES // values_per_image))


def suggestions(sample: ImageSample) -> dict[str, NoiseSuggestion]:
    """What ingest writes into the manifest: a suggestion for the images as they are, and one for mirrored ones too.

    Returns:
        Nothing if the images are all alike.
    """
    images = torch.from_numpy(sample.images)
    few = images[torch.from_numpy(_some(len(images), values_per_image=images[0].numel()))]
    found = {}
    for name, flips in (("plain", False), ("mirrored", True)):
        maximum, exact = largest_distance(images, flips=flips, most_work=_MOST_WORK)
        if maximum <= AutoNoiseConfig(kind="auto").sigma_L:
            return {}
        distances = replace(
            pair_distances(few, flips=flips), maximum=maximum, num_images=len(images), exact=sample.complete and exact
        )
        found[name] = suggest_noise(distances, dimension=images[0].numel())
    return found


def _some(count: int, *, values_per_image: int) -> NDArray[np.int64]:
    """Which images the percentile rests on."""
    most = max(2, min(_FEW, math.isqrt(int(_FEW_WORK / values_per_image))))
    chosen: NDArray[np.int64] = np.sort(keyed_permutation(0, epoch=0, size=count)[:most])
    return chosen


def resolve_noise(config: Config, manifest: Manifest) -> Config:
    """The config with the levels that `noise: auto` stands for; any other config as it is.

    Raises:
        UserError: if the manifest has no distances, or the chosen levels do not fit the rest of the config.
    """
    noise = config.noise
    if not isinstance(noise, AutoNoiseConfig):
        return config
    suggestion = suggest_noise(
        _distances(config, manifest),
        dimension=math.prod(manifest.shape),
        sigma_L=noise.sigma_L,
        overlap=noise.overlap,
    )
    tree = config.model_dump(mode="json") | {"noise": noise_section(suggestion)}
    return from_yaml(json.dumps(tree), origin="the config with the levels of noise: auto")


def noise_section(suggestion: NoiseSuggestion) -> Mapping[str, Any]:
    """The config's section `noise` for a suggestion."""
    return {"sigma_1": suggestion.sigma_1, "sigma_L": suggestion.sigma_L, "num_levels": suggestion.num_levels}


def _distances(config: Config, manifest: Manifest) -> PairDistances:
    found = manifest.suggested_noise
    if found is None:
        raise UserError(
            "noise",
            f"needs the distances between the images, and the data set {manifest.name}/{manifest.digest} was "
            "ingested before they were kept",
            hint="`ncsn ingest` under another --run NAME adds them",
            value="auto",
        )
    if not found:
        raise UserError(
            "noise",
            f"finds no levels: the images of {manifest.name}/{manifest.digest} are all alike",
            hint="give noise.sigma_1, noise.sigma_L and noise.num_levels",
            value="auto",
        )
    return found["mirrored" if config.data.horizontal_flip else "plain"].distances
