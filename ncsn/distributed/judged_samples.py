"""Samples of one checkpoint by several samplers, judged by Ray tasks; the images themselves are not kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch

from ncsn import checkpoint
from ncsn.config import Config
from ncsn.config.schema import SamplingConfig
from ncsn.core.allocator import borrowed_gpu_memory
from ncsn.evaluation.frechet_distance import FrechetStatistics, frechet_distance
from ncsn.evaluation.judge import judge_of
from ncsn.generation import generate

Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SamplesToJudge:
    """One checkpoint and how its samples are judged.

    Attributes:
        config: The experiment whose evaluation section decides what looks at the images.
        dataset: URI of the data set that they are compared with.
        checkpoint: URI of the checkpoint.
        num_images: Images by each sampler.
    """

    config: Config
    dataset: str
    checkpoint: str
    num_images: int


@dataclass(frozen=True)
class _Part:
    samples: SamplesToJudge
    sampling: SamplingConfig
    first: int
    count: int


def frechet_distances(samples: SamplesToJudge, samplings: Sequence[SamplingConfig]) -> list[float | None]:
    """Frechet distance to the training images of the samples by each sampler, None if one left the finite numbers.

    As many tasks run at a time as training has workers, so that no more than its resources are taken.
    """
    compute, size = samples.config.compute, samples.config.sampling.batch_size
    task = _features_of.options(
        num_cpus=compute.cpus_per_worker,
        num_gpus=1 if compute.use_gpu else 0,
        scheduling_strategy="DEFAULT",  # not in the placement group of a trial's driver, which has no CPU
    )
    queue = [
        (index, _Part(samples, sampling, first, min(size, samples.num_images - first)))
        for index, sampling in enumerate(samplings)
        for first in range(0, samples.num_images, size)
    ]
    found: list[dict[int, Features]] = [{} for _ in samplings]
    broken: set[int] = set()
    running: dict[Any, tuple[int, int]] = {}
    while queue or running:
        while queue and len(running) < compute.max_workers:
            index, part = queue.pop(0)
            if index not in broken:
                running[task.remote(part)] = (index, part.first)
        if not running:
            continue
        (finished,), _ = ray.wait(list(running), num_returns=1)
        index, first = running.pop(finished)
        try:
            found[index][first] = ray.get(finished)
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, ValueError):
                raise
            broken.add(index)
    reference = judge_of(samples.config, samples.dataset).reference.statistics
    return [
        None if index in broken else frechet_distance(FrechetStatistics.of(_in_order(features)), reference)
        for index, features in enumerate(found)
    ]


def _in_order(features: dict[int, Features]) -> Features:
    return np.concatenate([features[first] for first in sorted(features)])


@lru_cache(maxsize=1)
def _load(uri: str, device: str) -> checkpoint.SamplingCheckpoint:
    return checkpoint.load_for_sampling(uri, device=device)


@ray.remote(max_retries=3)
def _features_of(part: _Part) -> Features:
    config = part.samples.config
    torch.set_num_threads(config.compute.cpus_per_worker)
    device = "cuda" if config.compute.use_gpu else "cpu"
    with borrowed_gpu_memory():
        images = generate(
            _load(part.samples.checkpoint, device),
            sampling=part.sampling,
            first=part.first,
            count=part.count,
            device=device,
        )
        return judge_of(config, part.samples.dataset).extractor.extract(images).features
