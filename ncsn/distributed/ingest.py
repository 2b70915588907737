"""Ingestion as Ray tasks, one per part file.

Which images a part holds is decided before any of them is read, so any task can write it, again if it must. Finished
parts wait in the store, where an ingestion that is started again finds them. The process that asks reads the parts in
their order, behind the tasks that write them: the digest, the statistics and the sample are those of one pass over all
rows, however many tasks there were.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray

from ncsn import storage
from ncsn.config.schema import DataConfig
from ncsn.data.format import MANIFEST, Manifest, Part, load_manifest
from ncsn.data.parquet import Counter, PartWriter, block_rows, inspect_part, part_name, read_part, take
from ncsn.data.source import BadImages, DivisibleImages, Source
from ncsn.data.statistics import SHAPING, Dataset, SplitSummary, publish_dataset

TASKS_PER_CPU = 2
"""Tasks at a time: one at work and one waiting per core, so that the queue of a million images stays small."""


@dataclass(frozen=True)
class _Task:
    """One part to write: its images, its URI, and the folder beside which it is made."""

    images: DivisibleImages
    uri: str
    near: str
    data: DataConfig


def write_dataset_in_tasks(
    source: Source,
    folder: str,
    *,
    name: str,
    data: DataConfig,
    fingerprint: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """What `ncsn.data.parquet.write_dataset` does, on the connected Ray cluster.

    Args:
        source: The images, all splits of which can be read in sections.
        folder: URI of the folder that holds all versions of this dataset; every node reaches it.
        name: Name of the dataset.
        data: The settings that the source was opened with.
        fingerprint: Digest of the source's files. Parts that an earlier attempt left are used if it was the same.
        on_progress: Called with (images written and read back, images offered).

    Raises:
        UserError: if an image does not decode or fit, or a split has fewer than 2 images.
        ray.exceptions.RayError: if the same part was lost four times.
    """
    key = _key(data, fingerprint)
    receipt = storage.join(folder, f".ingested-{key}.json")
    known = _known(folder, receipt)
    if known is not None:
        return known
    staging = storage.join(folder, f".parts-{key}")
    try:
        splits = _write_splits(source, staging, data=data, on_progress=on_progress)

        def publish(manifest: Manifest, uri: str) -> bool:
            storage.write_text(storage.join(staging, MANIFEST), manifest.to_json())
            return storage.publish_staged(staging, uri, marker=MANIFEST)

        dataset = publish_dataset(source, splits, folder, name=name, data=data, publish=publish)
    except FileNotFoundError:
        # Another process that ingests the same images was quicker, and took the parts to their place.
        known = _known(folder, receipt)
        if known is None:
            raise
        return known
    storage.write_text(receipt, json.dumps({"digest": dataset.manifest.digest}))
    storage.delete_folder(staging)
    return dataset


def _key(data: DataConfig, fingerprint: str) -> str:
    settings = data.model_dump(mode="json")
    content = {setting: settings[setting] for setting in (*SHAPING, "rows_per_part", "root")}
    return storage.digest([fingerprint, content], 16)


def _known(folder: str, receipt: str) -> Dataset | None:
    """The dataset that these files gave before, if it is still there."""
    try:
        uri = storage.join(folder, storage.read_json(receipt)["digest"])
        return Dataset(uri, load_manifest(uri), created=False)
    except FileNotFoundError:
        return None


def _write_splits(
    source: Source, staging: str, *, data: DataConfig, on_progress: Callable[[int, int], None] | None
) -> dict[str, SplitSummary]:
    counter = Counter(source, on_progress)
    shape = (data.image_size, data.image_size, data.channels)
    splits = {}
    for name, split in source.splits.items():
        assert split.images is not None, "only sources of sections come here"
        summary = SplitSummary.of(source, data)
        for path in _written_parts(split.images, staging, name, data=data):
            rows, skipped = inspect_part(storage.join(staging, path))
            source.skipped.extend(skipped)
            part = Part(path, rows)
            for block in read_part(staging, part, shape=shape):
                summary.update(block)
                counter.add(len(block))
            if rows:
                summary.parts.append(part)
            else:
                storage.delete_file(storage.join(staging, path))
        summary.require_enough(name, source, data)
        splits[name] = summary
    counter.finish()
    return splits


def _written_parts(images: DivisibleImages, staging: str, split: str, *, data: DataConfig) -> Iterator[str]:
    """Paths of the parts in their order, each as soon as it is there; those that are missing are made meanwhile."""
    folder = staging.rpartition("/")[0]
    present = set(storage.list_names(storage.join(staging, split)))
    most = TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting: deque[tuple[str, Any]] = deque()
    try:
        for number, first in enumerate(range(0, len(images), data.rows_per_part)):
            path = part_name(split, number)
            task = None
            if path.rpartition("/")[2] not in present:
                section = images.section(first, first + data.rows_per_part)
                task = _write_part.remote(_Task(section, storage.join(staging, path), folder, data))
            waiting.append((path, task))
            if len(waiting) >= most:
                yield _settled(*waiting.popleft())
        while waiting:
            yield _settled(*waiting.popleft())
    finally:
        for _, task in waiting:
            if task is not None:
                ray.cancel(task)


def _settled(path: str, task: Any) -> str:
    if task is not None:
        try:
            ray.get(task)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, (ValueError, OSError)) else error from None
    return path


@ray.remote(num_cpus=1, max_retries=3)
def _write_part(task: _Task) -> None:
    """Write a part beside its place, then move it there whole."""
    data = task.data
    shape = (data.image_size, data.image_size, data.channels)
    bad = BadImages(skip=data.on_bad_image == "skip")
    examples = task.images.stream(bad, cores=1)
    with storage.scratch_folder(task.near) as scratch:
        file = scratch / "part.parquet"
        with PartWriter(file, shape) as writer:
            while block := take(examples, block_rows(shape)):
                writer.write(block)
            writer.note_skipped(bad.skipped)
        storage.publish_file(file, task.uri)
