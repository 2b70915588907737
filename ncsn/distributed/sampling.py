"""Sampling as Ray tasks: shards of images, and samples that are measured and not kept.

Image i of a run is a function of (checkpoint, sampler settings, seed, i). Shards therefore never disagree, and a
second call makes only the ranges that are missing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, TypeVar

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn import storage
from ncsn.config import Config
from ncsn.config.schema import SamplingConfig
from ncsn.data.shards import missing_ranges, read_samples, shard_name, write_shard
from ncsn.distributed.tasks import call, calls, runner_of
from ncsn.evaluation.extractors import batches, extract_all
from ncsn.evaluation.reference import extractor_of, open_evaluator
from ncsn.model import checkpoint
from ncsn.model.generate import generate, level_images

Features = NDArray[np.float32]


class OnLevels(Protocol):
    """Sees images on their way from noise. Picklable."""

    def add(self, stage: int, images: NDArray[np.uint8]) -> None:
        """Take `[N, H, W, C]` of a stage, 0 = the start; the last stage comes twice, the second time finished."""


W = TypeVar("W", bound=OnLevels)


@dataclass(frozen=True)
class OnFeatures:
    """What looks at images while others are still being made.

    Attributes:
        config: The experiment whose evaluation section names the extractor.
        dataset: URI of the data set beside which the extractor is kept.
        take: Called here with the index of a first image and the features [n, D] of n images, in any order.
    """

    config: Config
    dataset: str
    take: Callable[[int, Features], None]


@dataclass(frozen=True)
class Shard:
    """Images `first .. first + count` of one set of samples.

    Attributes:
        checkpoint: URI of the checkpoint, or of a registered model's files.
        sampling: Sampler and seed.
        folder: URI that receives the shard.
        first: Index of the first image.
        count: Number of images.
        threads: torch threads.
        use_gpu: Compute on the task's GPU.
    """

    checkpoint: str
    sampling: SamplingConfig
    folder: str
    first: int
    count: int
    threads: int
    use_gpu: bool

    @property
    def uri(self) -> str:
        """Where the shard is published."""
        return storage.join(self.folder, shard_name(self.first, self.first + self.count))


def shards(template: Shard, *, num_images: int, missing: bool) -> list[Shard]:
    """What `sample_missing` would make, or all that it would make and look at."""
    names = storage.list_names(template.folder) if missing else []
    return _pieces(template, missing_ranges(names, num_images=num_images))


def sample_missing(
    template: Shard, *, num_images: int, progress: Callable[[int, int], None], on_features: OnFeatures | None = None
) -> int:
    """Make what is missing of images `0 .. num_images` on the connected Ray cluster, or here if there is none.

    Args:
        template: A shard whose `count` is the batch size.
        num_images: Images wanted in all.
        progress: Called with (images there, images wanted).
        on_features: Gets the features of all images, of those that are there already first.

    Returns:
        How many images were made now.

    Raises:
        UserError: if the sampler leaves the finite numbers.
    """
    gaps = missing_ranges(storage.list_names(template.folder), num_images=num_images)
    evaluator = (on_features.config, on_features.dataset) if on_features is not None else None
    work = [_Work(shard, evaluator) for shard in _pieces(template, gaps)]
    made, there = 0, num_images - sum(each.shard.count for each in work)
    if on_features is not None:
        # First, since it takes little, and no score comes before that of the first images.
        made_before = _pieces(template, _between(gaps, num_images=num_images))
        work = [_Work(shard, evaluator, there=True) for shard in made_before] + work
    # Features come from the task that made the shard: separate tasks would queue behind all remaining shards. Starting
    # Ray for one shard takes half of the time for 64 digits.
    for each, features in (_as_calls if ray.is_initialized() else _here)(work):
        if on_features is not None and features is not None:
            on_features.take(each.shard.first, features)
        made += 0 if each.there else each.shard.count
        progress(there + made, num_images)
    return made


@dataclass(frozen=True)
class _Work:
    """A shard to make, or only to look at if it is there, and what looks at it: a config and the URI of a data set."""

    shard: Shard
    evaluator: tuple[Config, str] | None
    there: bool = False


def _here(work: Sequence[_Work]) -> Iterator[tuple[_Work, Features | None]]:
    """One after the other in this process."""
    with _as_before():
        for each in work:
            yield each, _sample_shard(each)


@contextmanager
def _as_before() -> Iterator[None]:
    """Leave this process with the threads that it had, and without the network."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _load.cache_clear()


def _as_calls(work: Sequence[_Work]) -> Iterator[tuple[_Work, Features | None]]:
    """On the connected cluster, as they finish."""
    if not work:
        return iter(())
    shard = work[0].shard
    return calls(_sample_shard, deque(work), cpus=shard.threads, use_gpu=shard.use_gpu)


def _pieces(template: Shard, ranges: list[tuple[int, int]]) -> list[Shard]:
    return [
        replace(template, first=first, count=min(template.count, last - first))
        for start, last in ranges
        for first in range(start, last, template.count)
    ]


def _between(gaps: list[tuple[int, int]], *, num_images: int) -> list[tuple[int, int]]:
    """What lies between the gaps of `0 .. num_images`."""
    firsts, lasts = [0, *(last for _, last in gaps)], [*(first for first, _ in gaps), num_images]
    return [(first, last) for first, last in zip(firsts, lasts, strict=True) if first < last]


def watch_levels(shard: Shard, on_levels: W) -> W:
    """Make the shard's images once more and show them; nothing is written.

    Args:
        shard: The images.
        on_levels: Sees them at the start, after each noise level, and at last finished; it travels to the task.

    Returns:
        `on_levels` as it came back.
    """
    if not ray.is_initialized():
        with _as_before():
            return _watch_levels(shard, on_levels)
    returned: W = call(_watch_levels, shard, on_levels, cpus=shard.threads, use_gpu=shard.use_gpu)
    return returned


def _watch_levels(shard: Shard, on_levels: W) -> W:
    torch.set_num_threads(shard.threads)
    device = "cuda" if shard.use_gpu else "cpu"
    stages = 0

    def on_level(stage: int, x: Tensor) -> None:
        nonlocal stages
        stages = stage
        on_levels.add(stage, level_images(x, shard.sampling))

    loaded = _load(shard.checkpoint, device)
    final = generate(
        loaded, sampling=shard.sampling, first=shard.first, count=shard.count, device=device, on_level=on_level
    )
    on_levels.add(stages, final)
    return on_levels


def _sample_shard(work: _Work) -> Features | None:
    """Make and publish the shard unless it is there; the features of its images if there is an evaluator."""
    torch.set_num_threads(work.shard.threads)
    images = (_read if work.there else _make)(work.shard)
    if work.evaluator is None:
        return None
    config, dataset = work.evaluator
    seen = batches(images, batch_size=config.evaluation.batch_size)
    return extract_all(extractor_of(config, dataset), seen).features


def _make(shard: Shard) -> NDArray[np.uint8]:
    device = "cuda" if shard.use_gpu else "cpu"
    loaded = _load(shard.checkpoint, device)
    images = generate(
        loaded,
        sampling=shard.sampling,
        first=shard.first,
        count=shard.count,
        device=device,
    )
    write_shard(shard.uri, images)
    return images


def _read(shard: Shard) -> NDArray[np.uint8]:
    """Images that are in the folder already, by whatever shards."""
    last = shard.first + shard.count
    images = list(read_samples(shard.folder, start=shard.first, num_images=last, batch_size=shard.count))
    return np.concatenate(images)


@lru_cache(maxsize=1)
def _load(uri: str, device: str) -> checkpoint.TrainedNetwork:
    return checkpoint.load_for_generation(uri, device=device)


@dataclass(frozen=True)
class SamplesToScore:
    """One checkpoint and how its samples are scored.

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
    samples: SamplesToScore
    index: int
    sampling: SamplingConfig
    first: int
    count: int


def score_samples(samples: SamplesToScore, samplings: Sequence[SamplingConfig]) -> list[float | None]:
    """Frechet distance to the training images of the samples by each sampler, None if one left the finite numbers.

    As many tasks run at a time as training has workers, so that no more than its resources are taken.
    """
    compute, size = samples.config.compute, samples.config.sampling.batch_size
    evaluator = open_evaluator(samples.config, samples.dataset, runner=runner_of(compute))
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
        None if index in broken else evaluator.distance(_in_order(features)) for index, features in enumerate(found)
    ]


def _in_order(features: dict[int, Features]) -> Features:
    return np.concatenate([features[first] for first in sorted(features)])


@lru_cache(maxsize=1)
def _load_for_scoring(uri: str, device: str) -> checkpoint.SamplingCheckpoint:
    return checkpoint.load_for_sampling(uri, device=device)


def _features_of(part: _Part) -> Features | None:
    """Features of the samples; None if the sampler left the finite numbers."""
    config = part.samples.config
    device = "cuda" if config.compute.use_gpu else "cpu"
    loaded = _load_for_scoring(part.samples.checkpoint, device)
    try:
        images = generate(loaded, sampling=part.sampling, first=part.first, count=part.count, device=device)
    except ValueError:
        return None
    return extractor_of(config, part.samples.dataset).extract(images).features
