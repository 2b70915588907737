"""Samples of one checkpoint by several samplers, judged by Ray tasks; the images themselves are not kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ncsn.config import Config
from ncsn.config.schema import SamplingConfig
from ncsn.distributed.tasks import calls, runner_of
from ncsn.evaluation.frechet import FrechetStatistics, frechet_distance
from ncsn.evaluation.reference import extractor_of, obtain_judge
from ncsn.model import checkpoint
from ncsn.model.generate import generate

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
    index: int
    sampling: SamplingConfig
    first: int
    count: int


def frechet_distances(samples: SamplesToJudge, samplings: Sequence[SamplingConfig]) -> list[float | None]:
    """Frechet distance to the training images of the samples by each sampler, None if one left the finite numbers.

    As many tasks run at a time as training has workers, so that no more than its resources are taken.
    """
    compute, size = samples.config.compute, samples.config.sampling.batch_size
    reference = obtain_judge(samples.config, samples.dataset, runner=runner_of(compute)).reference.statistics
    queue = deque(
        _Part(samples, index, sampling, first, min(size, samples.num_images - first))
        for index, sampling in enumerate(samplings)
        for first in range(0, samples.num_images, size)
    )
    found: list[dict[int, Features]] = [{} for _ in samplings]
    broken: set[int] = set()
    for part, features in calls(
        _features_of, queue, cpus=compute.cpus_per_worker, use_gpu=compute.use_gpu, at_once=compute.max_workers
    ):
        if features is not None:
            found[part.index][part.first] = features
        elif part.index not in broken:
            broken.add(part.index)
            for other in [other for other in queue if other.index == part.index]:
                queue.remove(other)
    return [
        None if index in broken else frechet_distance(FrechetStatistics.of(_in_order(features)), reference)
        for index, features in enumerate(found)
    ]


def _in_order(features: dict[int, Features]) -> Features:
    return np.concatenate([features[first] for first in sorted(features)])


@lru_cache(maxsize=1)
def _load(uri: str, device: str) -> checkpoint.SamplingCheckpoint:
    return checkpoint.load_for_sampling(uri, device=device)


def _features_of(part: _Part) -> Features | None:
    """Features of the samples; None if the sampler left the finite numbers."""
    config = part.samples.config
    device = "cuda" if config.compute.use_gpu else "cpu"
    loaded = _load(part.samples.checkpoint, device)
    try:
        images = generate(loaded, sampling=part.sampling, first=part.first, count=part.count, device=device)
    except ValueError:
        return None
    return extractor_of(config, part.samples.dataset).extract(images).features
