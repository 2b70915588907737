"""Sampling as Ray tasks: shards of images, and features of samples that are not kept.

Image i of a run is a function of (checkpoint, sampler settings, seed, i). Shards therefore never disagree, and a
second call makes only the ranges that are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ncsn import storage
from ncsn.config import Config
from ncsn.config.schema import SamplingConfig
from ncsn.data.samples import missing_ranges, read_samples, shard_name, write_shard
from ncsn.distributed.tasks import run_tasks
from ncsn.errors import InvalidValue
from ncsn.evaluation.extractors import batches
from ncsn.evaluation.features import extractor_of
from ncsn.model.generate import generate, image_labels, level_images
from ncsn.model.trained import load_checkpoint_or_model
from ncsn.progress import Progress

Features = NDArray[np.float32]

# Of the strip, which shows some images on their way from noise: `[stages, N, H, W, C]` uint8.
LEVELS = "levels.npy"
STRIP_IMAGES, STRIP_STAGES, STRIP_BYTES = 8, 12, 1_500_000


@dataclass(frozen=True)
class Shard:
    """Images `first .. first + count` of one set of samples."""

    config: Config  # its section compute; for features, evaluation too
    sampling: SamplingConfig
    checkpoint: str  # URI of a checkpoint, or of the files of a registered model
    folder: str
    first: int
    count: int
    dataset: str | None = None  # URI; the features of the images are wanted, by the extractor kept there
    exists: bool = False


def plan_shards(config: Config, *, checkpoint: str, folder: str, dataset: str | None = None) -> list[Shard]:
    """The shards of the config's images that are still missing, each of `sampling.batch_size` images.

    With a `dataset`, whose extractor is used, the features of all images are wanted too. Then the images that exist
    come first: they take little time, and there is no score before the first images.
    """
    sampling = config.sampling
    gaps = missing_ranges(storage.list_names(folder), num_images=sampling.num_images)
    shard = Shard(config, sampling, checkpoint, folder, first=0, count=sampling.batch_size, dataset=dataset)
    missing = _cut(shard, gaps)
    if dataset is None:
        return missing
    firsts, lasts = [0, *(last for _, last in gaps)], [*(first for first, _ in gaps), sampling.num_images]
    return [*_cut(replace(shard, exists=True), zip(firsts, lasts, strict=True)), *missing]


def _cut(template: Shard, ranges: Iterable[tuple[int, int]]) -> list[Shard]:
    return [
        replace(template, first=first, count=min(template.count, last - first))
        for start, last in ranges
        for first in range(start, last, template.count)
    ]


def make_shards(
    config: Config,
    shards: Sequence[Shard],
    *,
    progress: Progress,
    on_features: Callable[[int, Features], None] | None = None,
) -> int:
    """Make the planned shards on the connected Ray cluster, or here if there is none, and return how many images.

    `on_features` is called with the index of a first image and the features [n, D] of n images, in any order.
    """
    compute, total = config.compute, config.sampling.num_images
    made = sum(shard.count for shard in shards if not shard.exists)
    progress.start(total, "images")
    progress.advance(total - made)
    # Features come from the task that made the shard: separate tasks would queue behind all remaining shards.
    for shard, features in run_tasks(_sample_shard, shards, cpus=compute.cpus_per_worker, gpu=compute.use_gpu):
        if on_features is not None and features is not None:
            on_features(shard.first, features)
        progress.advance(0 if shard.exists else shard.count)
    return made


def _sample_shard(shard: Shard) -> Features | None:
    """Publish the shard unless it exists; the features of its images if they are wanted."""
    if shard.exists:
        images = read_samples(shard.folder, shard.first, shard.first + shard.count)
    else:
        images = _generate(shard) if shard.first else _generate_with_strip(shard)
        trained = _load(shard.checkpoint, device=shard.config.compute.device)
        labels = image_labels(trained, shard.sampling, first=shard.first, count=shard.count)
        uri = storage.join(shard.folder, shard_name(shard.first, shard.first + shard.count))
        write_shard(uri, images, labels=None if labels is None else labels.numpy())
    if shard.dataset is None:
        return None
    extractor = extractor_of(shard.config, shard.dataset)
    parts = batches(images, batch_size=shard.config.evaluation.batch_size)
    return np.concatenate([extractor.extract(part).features for part in parts])


def sample_features(
    config: Config,
    candidates: Sequence[tuple[str, SamplingConfig]],
    *,
    dataset: str,
    num_images: int,
) -> Iterator[tuple[int, Features | None]]:
    """Number of a candidate, and the features [N, D] of `num_images` of its samples; None if one is not finite.

    A candidate is the URI of a checkpoint and a way to sample from it. Its samples are not kept. The features come as
    they are done.
    """
    compute = config.compute
    found: list[dict[int, Features]] = [{} for _ in candidates]
    broken: set[int] = set()
    templates = (
        Shard(config, sampling, checkpoint, "", 0, sampling.batch_size, dataset) for checkpoint, sampling in candidates
    )
    parts = (
        (index, shard)
        for index, template in enumerate(templates)
        for shard in _cut(template, [(0, num_images)])
        if index not in broken  # asked when a task begins
    )
    # As many tasks at a time as training has workers, so that no more than its resources are taken.
    for (index, shard), features in run_tasks(
        _score_shard, parts, cpus=compute.cpus_per_worker, gpu=compute.use_gpu, in_flight=compute.max_workers
    ):
        if index in broken:
            continue
        if features is None:
            broken.add(index)
            yield index, None
            continue
        found[index][shard.first] = features
        if sum(map(len, found[index].values())) == num_images:
            yield index, np.concatenate([part for _, part in sorted(found[index].items())])
            found[index] = {}


def _score_shard(part: tuple[int, Shard]) -> Features | None:
    _, shard = part
    assert shard.dataset is not None
    _load(shard.checkpoint, device=shard.config.compute.device)  # an error of the checkpoint is not the sampler's
    try:
        images = _generate(shard)
    except InvalidValue:  # not finite
        return None
    return extractor_of(shard.config, shard.dataset).extract(images).features


def _generate(shard: Shard, on_level: Callable[[int, Tensor], None] | None = None) -> NDArray[np.uint8]:
    device = shard.config.compute.device
    trained, first, count = _load(shard.checkpoint, device=device), shard.first, shard.count
    return generate(trained, sampling=shard.sampling, first=first, count=count, device=device, on_level=on_level)


def _generate_with_strip(shard: Shard) -> NDArray[np.uint8]:
    """The images of the shard; some of them are kept at some noise levels too."""
    stages: dict[int, NDArray[np.uint8]] = {}  # at most `STRIP_STAGES`, evenly spread, and always the last
    every = 1
    data = shard.config.data
    count = max(
        1,
        min(STRIP_IMAGES, STRIP_BYTES // (STRIP_STAGES * data.channels * data.image_size**2)),
    )

    def on_level(stage: int, x: Tensor) -> None:
        nonlocal every
        for number in [number for number in stages if number % every]:
            del stages[number]
        stages[stage] = level_images(x[:count], shard.sampling, shard.config)
        if stage % every == 0 and len(stages) == STRIP_STAGES:  # how many more will come is not known
            every *= 2

    images = _generate(shard, on_level)
    stages[max(stages, default=0)] = images[:count]
    storage.write_array(storage.join(shard.folder, LEVELS), np.stack(list(stages.values())))
    return images


_load = lru_cache(maxsize=1)(load_checkpoint_or_model)
