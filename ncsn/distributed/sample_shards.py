"""Annealed sampling as Ray tasks, one per shard of images.

Image i of a run is a function of (checkpoint, sampler settings, seed, i). Shards therefore never disagree, and a
second call makes only the ranges that are missing.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn import checkpoint, storage
from ncsn.config.schema import SamplingConfig
from ncsn.core.images import to_uint8
from ncsn.data.row import NO_LABEL, Images, to_table
from ncsn.evaluation.samples import SHARD_NAME
from ncsn.generation import generate


class Watcher(Protocol):
    """Sees images on their way from noise. Picklable."""

    def add(self, stage: int, images: NDArray[np.uint8]) -> None:
        """Take `[N, H, W, C]` of a stage, 0 = the start; the last stage comes twice, the second time finished."""


W = TypeVar("W", bound=Watcher)


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
        last = self.first + self.count
        return storage.join(self.folder, f"shard-{self.first:09d}-{last:09d}.parquet")


def missing_ranges(names: list[str], *, num_images: int) -> list[tuple[int, int]]:
    """Index ranges `[first, last)` below `num_images` that no shard among `names` holds."""
    present = sorted(tuple(map(int, match.groups())) for match in map(SHARD_NAME.fullmatch, names) if match)
    gaps, position = [], 0
    for first, last in [*present, (num_images, num_images)]:
        if min(first, num_images) > position:
            gaps.append((position, min(first, num_images)))
        position = max(position, last)
    return gaps


def sample_missing(template: Shard, *, num_images: int, progress: Callable[[int, int], None]) -> int:
    """Make what is missing of images `0 .. num_images` on the connected Ray cluster.

    Args:
        template: A shard whose `count` is the batch size.
        num_images: Images wanted in all.
        progress: Called with (images there, images wanted).

    Returns:
        How many images were made now.

    Raises:
        ValueError: if the sampler leaves the finite numbers.
    """
    gaps = missing_ranges(storage.list_names(template.folder), num_images=num_images)
    shards = [
        replace(template, first=first, count=min(template.count, last - first))
        for start, last in gaps
        for first in range(start, last, template.count)
    ]
    made, there = 0, num_images - sum(shard.count for shard in shards)
    task = _sample_shard.options(num_cpus=template.threads, num_gpus=1 if template.use_gpu else 0)
    waiting = {task.remote(shard): shard for shard in shards}
    try:
        while waiting:
            (finished,), _ = ray.wait(list(waiting), num_returns=1)
            ray.get(finished)
            made += waiting.pop(finished).count
            progress(there + made, num_images)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, ValueError) else error from None
    finally:
        for reference in waiting:
            ray.cancel(reference)
    return made


def watch_levels(shard: Shard, watcher: W) -> W:
    """Make the shard's images once more under the eyes of a watcher; nothing is written.

    Args:
        shard: The images.
        watcher: Sees them at the start, after each noise level, and at last finished; it travels to the task.

    Returns:
        The watcher as it came back.
    """
    task: Any = _watch_levels.options(num_cpus=shard.threads, num_gpus=1 if shard.use_gpu else 0)
    returned: W = ray.get(task.remote(shard, watcher))
    return returned


@ray.remote(max_retries=3)
def _watch_levels(shard: Shard, watcher: W) -> W:
    torch.set_num_threads(shard.threads)
    device = "cuda" if shard.use_gpu else "cpu"
    stages = 0

    def on_level(stage: int, x: Tensor) -> None:
        nonlocal stages
        stages = stage
        watcher.add(stage, to_uint8(x).cpu().numpy())

    loaded = _load(shard.checkpoint, device)
    final = generate(
        loaded, sampling=shard.sampling, first=shard.first, count=shard.count, device=device, on_level=on_level
    )
    watcher.add(stages, final)
    return watcher


@ray.remote(max_retries=3)
def _sample_shard(shard: Shard) -> None:
    torch.set_num_threads(shard.threads)
    device = "cuda" if shard.use_gpu else "cpu"
    loaded = _load(shard.checkpoint, device)
    images = generate(
        loaded,
        sampling=shard.sampling,
        first=shard.first,
        count=shard.count,
        device=device,
    )
    storage.write_bytes(shard.uri, _parquet_bytes(images))


@lru_cache(maxsize=1)
def _load(uri: str, device: str) -> checkpoint.TrainedNetwork:
    return checkpoint.load_for_generation(uri, device=device)


def _parquet_bytes(images: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(to_table(Images(images, np.full(len(images), NO_LABEL, np.int64))), buffer)
    return buffer.getvalue()
