"""`ncsn likelihood`: bits per dimension of test images under a trained network, in shards as Ray tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from ncsn.config.rules import likelihood_problems
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
from ncsn.distributed.cluster import cluster_for, ray_tags
from ncsn.distributed.tasks import run_tasks
from ncsn.errors import UserError
from ncsn.model.averages import sampled_checkpoint
from ncsn.model.checkpoint import SamplingCheckpoint, load_for_sampling, require_same_training
from ncsn.steps.step import Step

SEED = 0  # of the choice of images and of all draws, so that two networks are measured on the same numbers


@dataclass(frozen=True)
class LikelihoodResult:
    """The likelihood of images."""

    bits_per_dim: float  # mean, an upper bound for gray values
    error: float  # standard error of the mean; 0 for one image
    num_images: int
    metrics: dict[str, float]  # `eval/bits_per_dim_n<num_images>` and its standard error
    settings: dict[str, Any]
    fingerprint: str  # of settings and images; numbers of different ones do not compare
    checkpoint: str
    notes: list[str]


@dataclass(frozen=True)
class _Shard:
    """Images `first .. first + count` of the choice."""

    checkpoint: str
    dataset: str
    settings: LikelihoodConfig
    first: int
    count: int
    device: str


def run(config: Config, *, run: str, checkpoint: str, dataset: str, images: int | None = None) -> LikelihoodResult:
    """Measure the test images of the dataset under the EMA weights of a checkpoint.

    Args:
        config: Of the run; `evaluation.likelihood` says how.
        run: Name of the run.
        checkpoint: URI.
        dataset: URI of the ingested dataset.
        images: How many, instead of the config's.

    Raises:
        UserError: The network has no likelihood, the checkpoint is of another config, or there are no test images.
    """
    if problems := list(likelihood_problems(config)):
        raise UserError.of(problems)
    step = Step.claim("likelihood", config, run, LikelihoodResult, unit="images")
    checkpoint = sampled_checkpoint(checkpoint, config)
    trained = load_for_sampling(checkpoint)
    config = require_same_training(trained.config, config, origin=checkpoint)
    manifest = load_manifest(dataset)
    _require_fitting(trained, manifest, dataset)
    settings = config.evaluation.likelihood or LikelihoodConfig()
    count = min(images or settings.images, manifest.counts.get("test", 0))
    if count == 0:
        raise UserError("--dataset", "has no test images", value=dataset)
    settings = settings.model_copy(update={"images": count})
    facts = settings.model_dump(mode="json")
    inputs = {"checkpoint": trained.digest, "dataset": manifest.digest, "settings": facts}
    if result := step.found(inputs, needs=lambda _: []):
        return result
    size = min(config.sampling.batch_size, count)
    device = "cuda" if config.compute.use_gpu else "cpu"
    shards = [
        _Shard(checkpoint, dataset, settings, first, min(size, count - first), device)
        for first in range(0, count, size)
    ]
    with step.work(config) as work, cluster_for(config, tasks=len(shards), metadata=work.job_metadata()):
        work.tracked.set_tags({**ray_tags(), "checkpoint.uri": checkpoint, "checkpoint.digest": trained.digest})
        found = dict[int, NDArray[np.float64]]()
        compute = config.compute
        for shard, bits in run_tasks(_bits, shards, cpus=compute.cpus_per_worker, gpu=compute.use_gpu):
            found[shard.first] = bits
            work.progress(sum(map(len, found.values())), count)
        values = np.concatenate([bits for _, bits in sorted(found.items())])
        fingerprint = storage.digest({"settings": facts, "dataset": manifest.digest}, 12)
        result = _result(values, facts, fingerprint=fingerprint, checkpoint=checkpoint, notes=_notes(config, settings))
        work.tracked.log_metrics(result.metrics)
        work.tracked.set_tags({"likelihood.fingerprint": fingerprint})
    return step.done(result)


def _require_fitting(trained: SamplingCheckpoint, manifest: Manifest, dataset: str) -> None:
    """Refuse images of another shape or of other classes than the network's."""
    data = trained.config.data
    wanted: dict[str, object] = {"shape": (data.image_size, data.image_size, data.channels)}
    if trained.classes is not None:
        wanted["class_names"] = trained.classes.names
    for name, value in wanted.items():
        if (found := tuple(getattr(manifest, name))) != value:
            raise UserError("--dataset", f"its {name} is {found}, but the network's is {value}", value=dataset)


def _result(
    bits: NDArray[np.float64], facts: Mapping[str, Any], *, fingerprint: str, checkpoint: str, notes: list[str]
) -> LikelihoodResult:
    if not np.isfinite(bits).all():
        raise UserError(
            "evaluation.likelihood",
            f"{int((~np.isfinite(bits)).sum())} of {len(bits)} images have no finite likelihood",
            hint="raise its steps",
        )
    mean, error = float(bits.mean()), float(bits.std(ddof=1) / math.sqrt(len(bits))) if len(bits) > 1 else 0.0
    name = f"eval/bits_per_dim_n{len(bits)}"
    return LikelihoodResult(
        bits_per_dim=mean,
        error=error,
        num_images=len(bits),
        metrics={name: mean, name.replace("_dim_", "_dim_se_"): error},
        settings=dict(facts),
        fingerprint=fingerprint,
        checkpoint=checkpoint,
        notes=notes,
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


def _bits(shard: _Shard) -> NDArray[np.float64]:
    """Bits per dimension of each image of the shard."""
    trained, settings = _load(shard.checkpoint, shard.device), shard.settings
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


@lru_cache(maxsize=1)
def _load(uri: str, device: str) -> SamplingCheckpoint:
    return load_for_sampling(uri, device=device)
