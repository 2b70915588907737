"""The noise levels that fit a dataset: what ingest suggests, and what `noise: auto` stands for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ncsn.config import Config, from_yaml
from ncsn.config.noise import AutoNoiseConfig
from ncsn.core.noise_schedule import NoiseSuggestion, PairDistances, largest_distance, pair_distances, suggest_noise
from ncsn.data.format import Manifest
from ncsn.data.statistics import ImageSample
from ncsn.errors import UserError

_MOST_WORK = 2e11  # multiplications for the largest distance: some seconds on two CPU cores; real images need a tenth
_FEW, _FEW_WORK = 2_000, 6e9  # images compared in pairs for the percentile, and multiplications that this may take


def suggestions(sample: ImageSample) -> dict[str, NoiseSuggestion]:
    """Noise levels for the images as they are (`plain`) and with mirrored ones (`mirrored`); none if all are alike."""
    images = torch.from_numpy(sample.images)
    few = torch.from_numpy(sample.some(max(2, min(_FEW, math.isqrt(int(_FEW_WORK / images[0].numel()))))))
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


def resolve_noise(config: Config, manifest: Manifest) -> Config:
    """The config with the levels that `noise: auto` stands for; any other config as it is."""
    noise = config.noise
    if not isinstance(noise, AutoNoiseConfig):
        return config
    distances, dimension = _distances(config, manifest), math.prod(manifest.shape)
    suggestion = suggest_noise(distances, dimension=dimension, sigma_L=noise.sigma_L, overlap=noise.overlap)
    training = noise.training.model_dump(mode="json")
    tree = config.model_dump(mode="json") | {"noise": {**noise_section(suggestion), "training": training}}
    return from_yaml(json.dumps(tree), origin="the config with the levels of noise: auto")


def noise_section(suggestion: NoiseSuggestion) -> Mapping[str, Any]:
    """The config's section `noise` for a suggestion."""
    return {"sigma_1": suggestion.sigma_1, "sigma_L": suggestion.sigma_L, "num_levels": suggestion.num_levels}


def _distances(config: Config, manifest: Manifest) -> PairDistances:
    found = manifest.suggested_noise
    if found is None:
        raise UserError(
            "noise",
            f"needs the distances between the images, and the dataset {manifest.name}/{manifest.digest} was "
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
    return PairDistances(**found["mirrored" if config.data.horizontal_flip else "plain"]["distances"])
