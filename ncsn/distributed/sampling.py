"""Sampling as Ray tasks: shards of images, and features of samples that are not kept.

Image i of a run is a function of (checkpoint, sampler settings, seed, i). Shards therefore never disagree, and a
second call makes only the ranges that are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncsn import storage
from ncsn.config import Config
from ncsn.config.schema import SamplingConfig
from ncsn.core.images import eight_bit
from ncsn.data.samples import SampleSet, missing_ranges, shard_name, write_shard
from ncsn.distributed.ray_calls import call_all
from ncsn.errors import InvalidValue
from ncsn.evaluation.extractors import batches
from ncsn.evaluation.features import extractor_of
from ncsn.model import build
from ncsn.model.checkpoint import load_checkpoint
from ncsn.model.classes import BALANCED
from ncsn.model.generate import Strip, evaluations_per_image, generate, guide_of, image_labels
from ncsn.progress import Progress
from ncsn.training.context import WorkerContext, compiles

Features = NDArray[np.float32]

LEVELS = "levels.npy"  # file of the strip
# Evaluations of the network by one worker from which it is compiled: a GPU takes a minute for them, as compiling does.
MANY_EVALUATIONS = 500_000


@dataclass(frozen=True)
class Chunk:
    """Images `first .. first + count` of a seed: kept as a shard in `folder`, or else features alone."""

    config: Config  # its section compute; for features, evaluation too
    sampling: SamplingConfig
    checkpoint: str  # URI
    first: int
    count: int
    folder: str | None = None  # URI; the images are kept there, as a shard
    dataset: str | None = None  # URI; the features of the images are wanted, by the extractor kept there
    exists: bool = False  # whether the shard is there already
    number: int = 0  # of the samples that it is a part of, where there are several


def plan_shards(config: Config, *, checkpoint: str, folder: str, dataset: str | None = None) -> list[Chunk]:
    """The shards of the config's images that are still missing, each of `sampling.batch_size` images.

    With a `dataset`, whose extractor is used, the features of all images are wanted too. Then the images that exist
    come first: they take little time, and there is no score before the first images.
    """
    sampling = config.sampling
    gaps = missing_ranges(storage.list_names(folder), num_images=sampling.num_images)
    shard = Chunk(config, sampling, checkpoint, 0, sampling.batch_size, folder, dataset)
    missing = _cut(shard, gaps)
    if dataset is None:
        return missing
    firsts, lasts = [0, *(last for _, last in gaps)], [*(first for first, _ in gaps), sampling.num_images]
    return [*_cut(replace(shard, exists=True), zip(firsts, lasts, strict=True)), *missing]


def _cut(template: Chunk, ranges: Iterable[tuple[int, int]]) -> list[Chunk]:
    """Parts like the template over all of these ranges, each of at most its `count` images."""
    return [
        replace(template, first=first, count=min(template.count, last - first))
        for start, last in ranges
        for first in range(start, last, template.count)
    ]


def make_shards(
    config: Config,
    shards: Sequence[Chunk],
    *,
    progress: Progress,
    on_features: Callable[[int, Features], None] | None = None,
) -> int:
    """Make the planned shards on the connected Ray cluster, or here if there is none, and return how many images.

    `on_features` is called with the index of a first image and the features [n, D] of n images, in any order.
    """
    compute, total = config.compute, config.sampling.num_images
    made = sum(shard.count for shard in shards if not shard.exists)
    progress.start(total, "images", done=total - made)
    # Features come from the task that made the shard: separate tasks would queue behind all remaining shards.
    for shard, features in call_all(_sample_shard, shards, cpus=compute.cpus_per_worker, gpu=compute.use_gpu):
        if on_features is not None and features is not None:
            on_features(shard.first, features)
        progress.advance(0 if shard.exists else shard.count)
    return made


def _sample_shard(shard: Chunk) -> Features | None:
    """Publish the shard unless it exists; the features of its images if they are wanted."""
    assert shard.folder is not None, "a shard is kept"
    if shard.exists:
        last = shard.first + shard.count
        images = SampleSet(shard.folder, last).read(shard.first, last)
    else:
        strip = None if shard.first else Strip(shard.sampling, shard.config)
        images = _generate(shard, on_level=strip)
        if strip is not None:
            storage.write_array(storage.join(shard.folder, LEVELS), strip.frames(images))
        trained = _load(shard.checkpoint, device=shard.config.compute.device)
        labels = image_labels(trained, shard.sampling, first=shard.first, count=shard.count)
        uri = storage.join(shard.folder, shard_name(shard.first, shard.first + shard.count))
        limits = trained.config.data.pixels.limits
        write_shard(uri, images, labels=None if labels is None else labels.numpy(), limits=limits)
        images = eight_bit(images, limits)
    if shard.dataset is None:
        return None
    extractor = extractor_of(shard.config, shard.dataset)
    parts = batches(images, batch_size=shard.config.evaluation.batch_size)
    return np.concatenate([extractor.extract(part).features for part in parts])


def sample_features(
    config: Config, wanted: Sequence[tuple[str, SamplingConfig]], *, dataset: str, num_images: int
) -> Iterator[tuple[int, Features | None]]:
    """Position in `wanted`, and the features [N, D] of `num_images` samples; None if one is not finite.

    The samples `wanted` are of the URI of a checkpoint and a way to sample from it. They are not kept. The features
    come as they are done.
    """
    compute = config.compute
    found: list[dict[int, Features]] = [{} for _ in wanted]
    # Images that are asked for by class are no more than these.
    ways = [way.model_copy(update={"label": BALANCED}) if isinstance(way.label, dict) else way for _, way in wanted]
    broken: set[int] = set()
    parts = (
        part
        for number, ((checkpoint, _), sampling) in enumerate(zip(wanted, ways, strict=True))
        for part in _cut(
            Chunk(config, sampling, checkpoint, 0, sampling.batch_size, dataset=dataset, number=number),
            [(0, num_images)],
        )
        if number not in broken  # asked when a call begins
    )
    # As many tasks at a time as training has workers, so that no more than its resources are taken.
    for part, features in call_all(
        _score, parts, cpus=compute.cpus_per_worker, gpu=compute.use_gpu, in_flight=compute.max_workers
    ):
        number = part.number
        if number in broken:
            continue
        if features is None:
            broken.add(number)
            yield number, None
            continue
        found[number][part.first] = features
        if sum(map(len, found[number].values())) == num_images:
            yield number, np.concatenate([features for _, features in sorted(found[number].items())])
            found[number] = {}


def _score(part: Chunk) -> Features | None:
    trained = _load(part.checkpoint, device=part.config.compute.device)
    guide_of(trained, part.sampling)  # an error of either file is not the sampler's
    try:
        images = eight_bit(_generate(part), trained.config.data.pixels.limits)
    except InvalidValue:  # not finite
        return None
    assert part.dataset is not None, "its extractor is asked for"
    return extractor_of(part.config, part.dataset).extract(images).features


def _generate(part: Chunk, on_level: Strip | None = None) -> NDArray[Any]:
    config, sampling, device = part.config, part.sampling, part.config.compute.device
    build.tune_cuda(device)
    trained, first = _load(part.checkpoint, device=device), part.first
    share = evaluations_per_image(config) * config.sampling.num_images / config.compute.max_workers
    many = part.folder is not None and share >= MANY_EVALUATIONS and device == "cuda"
    compiled = many and compiles(config, WorkerContext(device))
    # A compiled network takes one number of images: it is compiled again for another.
    count = sampling.batch_size if compiled else part.count
    images = generate(
        trained, sampling=sampling, first=first, count=count, device=device, on_level=on_level, compiled=compiled
    )
    return images[: part.count]


_load = lru_cache(maxsize=1)(load_checkpoint)
