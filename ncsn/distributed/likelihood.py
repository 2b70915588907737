"""Bits per dimension of test images under a trained network, in shards as Ray tasks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn import storage
from ncsn.config import Config
from ncsn.config.evaluation import LikelihoodConfig
from ncsn.config.noise import LevelsTraining
from ncsn.core.images import dequantize
from ncsn.core.keyed_random import Stream, keyed_permutation, keyed_uniform
from ncsn.core.likelihood import (
    HIGHEST_SIGMA,
    LikelihoodOde,
    hutchinson_probes,
    sigma_data_of,
    truncated_bits,
    truncated_noise,
    uniform_bits,
)
from ncsn.data.format import Manifest, load_manifest
from ncsn.data.training_images import open_cache
from ncsn.distributed.tasks import run_tasks
from ncsn.errors import UserError, shown_value
from ncsn.model.checkpoint import SamplingCheckpoint, load_for_sampling, require_same_training
from ncsn.model.memory import likelihood_batch

SEED = 0  # of the choice of images and of all draws, so that two networks are measured on the same numbers


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of images."""

    bits_per_dim: float  # mean, an upper bound for gray values
    error: float  # standard error of the mean; 0 for one image
    num_images: int
    metrics: dict[str, float]  # `eval/bits_per_dim_n<num_images>` and its standard error
    settings: dict[str, Any]
    fingerprint: str  # of settings and images; numbers of different ones do not compare
    notes: list[str]


@dataclass(frozen=True)
class Shard:
    """Images `first .. first + count` of the choice. Picklable."""

    checkpoint: str
    dataset: str
    settings: LikelihoodConfig
    first: int
    count: int
    device: str


@dataclass(frozen=True)
class LikelihoodPlan:
    """What is to be measured."""

    config: Config  # with the noise levels of the network
    weights: str  # their digest
    dataset: str  # digest of its content
    settings: LikelihoodConfig  # with the number of images that there are
    shards: list[Shard]  # each of at most `likelihood_batch` images

    def measure(self, *, on_images: Callable[[int], None]) -> Likelihood:
        """Measure on the connected Ray cluster, or here if there is none; `on_images(n)` follows n more images."""
        found = dict[int, NDArray[np.float64]]()
        compute = self.config.compute
        for shard, part in run_tasks(bits_of, self.shards, cpus=compute.cpus_per_worker, gpu=compute.use_gpu):
            found[shard.first] = part
            on_images(len(part))
        bits = np.concatenate([part for _, part in sorted(found.items())])
        if not np.isfinite(bits).all():
            raise UserError(
                "evaluation.likelihood",
                f"{int((~np.isfinite(bits)).sum())} of {len(bits)} images have no finite likelihood",
                hint="raise evaluation.likelihood.steps",
            )
        facts = self.settings.model_dump(mode="json")
        mean, error = float(bits.mean()), float(bits.std(ddof=1) / math.sqrt(len(bits))) if len(bits) > 1 else 0.0
        name = f"eval/bits_per_dim_n{len(bits)}"
        return Likelihood(
            bits_per_dim=mean,
            error=error,
            num_images=len(bits),
            metrics={name: mean, name.replace("_dim_", "_dim_se_"): error},
            settings=facts,
            fingerprint=storage.digest({"settings": facts, "dataset": self.dataset}, 12),
            notes=_notes(self.config, self.settings),
        )


def plan_likelihood(config: Config, *, checkpoint: str, dataset: str, images: int | None = None) -> LikelihoodPlan:
    """Plan to measure test images of the dataset, `images` instead of the config's number, under a checkpoint."""
    trained = load_for_sampling(checkpoint)
    config = require_same_training(trained.config, config, origin=checkpoint)
    manifest = load_manifest(dataset)
    require_fitting(trained, manifest, dataset)
    settings = config.evaluation.likelihood or LikelihoodConfig()
    count = min(images or settings.images, manifest.counts.get("test", 0))
    if count == 0:
        raise UserError("--dataset", "has no test images", value=dataset)
    settings = settings.model_copy(update={"images": count})
    size, device = min(likelihood_batch(config), count), config.compute.device
    shards = [
        Shard(checkpoint, dataset, settings, first, min(size, count - first), device) for first in range(0, count, size)
    ]
    return LikelihoodPlan(config, trained.digest, manifest.digest, settings, shards)


def require_fitting(trained: SamplingCheckpoint, manifest: Manifest, dataset: str) -> None:
    """Refuse the images of `--dataset` if they have another shape or other classes than the network's."""
    data = trained.config.data
    wanted: dict[str, object] = {"shape": (data.image_size, data.image_size, data.channels)}
    if trained.classes is not None:
        wanted["class_names"] = trained.classes.names
    for name, value in wanted.items():
        if (found := tuple(getattr(manifest, name))) != value:
            raise UserError(
                "--dataset",
                f"its {name} is {shown_value(found)}, but the network's is {shown_value(value)}",
                value=dataset,
            )


def _notes(config: Config, settings: LikelihoodConfig) -> list[str]:
    notes = [
        f"dequantization {settings.dequantization}, Hutchinson's trace with {settings.probes} probes, "
        f"{settings.steps} Runge-Kutta steps, sigma from {settings.sigma_min:g} to {HIGHEST_SIGMA:g}"
    ]
    levels = config.levels
    trained = isinstance(config.noise.training, LevelsTraining)
    if trained and not (levels.sigma_L <= settings.sigma_min and levels.sigma_1 >= HIGHEST_SIGMA):
        notes.append(
            f"the network has seen sigma from {levels.sigma_L:g} to {levels.sigma_1:g} only, so what lies beyond is a "
            "guess; train with noise.training.kind = lognormal"
        )
    if config.data.num_classes is not None:
        notes.append("each image is given its class")
    return notes


def bits_of(shard: Shard) -> NDArray[np.float64]:
    """Bits per dimension of each image of the shard."""
    trained, settings = _load(shard.checkpoint, device=shard.device), shard.settings
    split = open_cache(shard.dataset, "test")
    # A random choice, because a split may be sorted by class.
    chosen = keyed_permutation(SEED, epoch=0, size=len(split))[shard.first : shard.first + shard.count]
    images = torch.from_numpy(np.ascontiguousarray(split.images[chosen]))
    count, height, width, channels = images.shape
    shape = (channels, height, width)
    size = math.prod(shape)
    u = keyed_uniform(SEED, stream=Stream.HELD_OUT_DEQUANTIZE, first=shard.first, count=count, size=size)
    u = u.view(count, *shape)
    noise_density = None
    if settings.dequantization == "uniform":
        x = dequantize(images, u)
    else:
        noise, noise_density = truncated_noise(u, sigma=settings.sigma_min)
        x = (dequantize(images, torch.tensor(0.5)).double() + noise).float()
    network, score = trained.network, getattr(trained.network, "score_at")  # noqa: B009 - not of every module
    if trained.config.data.num_classes is not None:
        score = partial(score, labels=torch.from_numpy(np.asarray(split.labels[chosen], np.int64)).to(shard.device))
    sigma_data = getattr(network, "sigma_data", None) or sigma_data_of(trained.moments)
    probes = hutchinson_probes(SEED, first=shard.first, count=count, number=settings.probes, shape=shape)
    ode = LikelihoodOde(sigma_data, settings.sigma_min, settings.steps)
    density: Tensor = ode.log_density(score, x.to(shard.device), probes=probes.to(shard.device)).cpu()
    bits = uniform_bits(density, size=size) if noise_density is None else truncated_bits(density, noise_density)
    values: NDArray[np.float64] = bits.double().numpy()
    return values


_load = lru_cache(maxsize=1)(load_for_sampling)
