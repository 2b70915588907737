"""Ingestion part by part, in this process or as Ray tasks.

Which images a part holds is decided before any of them is read, so any task can write it, and write it again. Finished
parts stay in the store for an ingestion that is started again. The driver reads the parts in their order while the
tasks write later ones: digest, statistics and sample are those of one pass over all rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import ray

from ncsn import storage
from ncsn.config.schema import DataConfig
from ncsn.data.dataset import Dataset, Progress, publish_dataset, shaping_settings
from ncsn.data.format import MANIFEST, Manifest, Part, Rows, load_manifest
from ncsn.data.parquet import PartWriter, block_rows, inspect_part, part_name, read_part, take
from ncsn.data.pixels import PIXELS_VERSION
from ncsn.data.sources.base import BadImages, Source, Split, image_shape
from ncsn.distributed.cluster import on_this_machine
from ncsn.distributed.tasks import run_tasks

# One running and one waiting per core, so that the queue of a million images stays small.
TASKS_PER_CPU = 2
# Up to here the threads of one process keep all cores busy, and starting Ray takes as long as ten thousand images.
FEW_CORES = 4


@dataclass(frozen=True)
class _Task:
    """One part to write."""

    images: Split
    uri: str
    near: str  # folder on the same disk for scratch files
    data: DataConfig


def few_cores() -> bool:
    """Whether this process does the work alone at least as fast as Ray tasks."""
    return on_this_machine() and (os.cpu_count() or 1) <= FEW_CORES


def write_dataset_in_parts(
    source: Source,
    folder: str,
    *,
    name: str,
    data: DataConfig,
    fingerprint: str,
    here: bool,
    on_progress: Progress | None = None,
) -> Dataset:
    """What `ncsn.data.parquet.write_dataset` does, but an ingestion that was stopped goes on where it was.

    Every node reaches `folder`. Parts of an earlier attempt are used if the `fingerprint` of the source's files was the
    same. Either this process writes the parts (`here`), or tasks on the connected Ray cluster.
    """
    content = shaping_settings(data) | {"rows_per_part": data.rows_per_part, "root": data.root}
    key = storage.digest([fingerprint, content, PIXELS_VERSION], 16)
    receipt = storage.join(folder, f".ingested-{key}.json")
    if (known := _known(folder, receipt)) is not None:
        return known
    staging = storage.join(folder, f".parts-{key}")
    bad = BadImages(skip=True)

    def write(split: str, images: Split, parts: list[Part]) -> Iterator[Rows]:
        return _blocks(_tasks(images, staging, split, data=data), staging, split, parts, bad, here=here)

    def publish(manifest: Manifest, uri: str) -> bool:
        storage.write_text(storage.join(staging, MANIFEST), manifest.to_json())
        return storage.publish_staged(staging, uri, marker=MANIFEST)

    try:
        dataset = publish_dataset(
            source, folder, name=name, data=data, bad=bad, write=write, publish=publish, on_progress=on_progress
        )
    except FileNotFoundError:
        # Another process that ingests the same images was faster and moved the parts to their place.
        if (known := _known(folder, receipt)) is None:
            raise
        return known
    storage.write_json(receipt, {"digest": dataset.manifest.digest})
    storage.delete_folder(staging)
    return dataset


def _known(folder: str, receipt: str) -> Dataset | None:
    """The dataset that these files gave before, if it is still there."""
    try:
        uri = storage.join(folder, storage.read_json(receipt)["digest"])
        return Dataset(uri, load_manifest(uri), created=False)
    except FileNotFoundError:
        return None


def _blocks(
    tasks: Mapping[str, _Task], staging: str, split: str, parts: list[Part], bad: BadImages, *, here: bool
) -> Iterator[Rows]:
    """The rows of a split: of the parts that this process writes, and of others as soon as they are in the store."""
    there = {f"{split}/{name}" for name in storage.list_names(storage.join(staging, split))}
    missing = {path: task for path, task in tasks.items() if path not in there}
    written: Iterator[object] = iter(()) if here else _written(missing.values())
    for path, task in tasks.items():
        rows, of_part = 0, BadImages(skip=task.data.on_bad_image == "skip")
        if here and path in missing:
            for block in _write_blocks(task, of_part, cores=None):
                rows += len(block)
                yield block
        else:
            if path in missing:
                next(written)
            rows, of_part = inspect_part(task.uri)
            yield from read_part(staging, Part(path, rows), shape=image_shape(task.data))
        bad.skipped.extend(of_part.skipped)
        bad.conversions.update(of_part.conversions)
        if rows:
            parts.append(Part(path, rows))
        else:
            storage.delete_file(task.uri)


def _tasks(images: Split, staging: str, split: str, *, data: DataConfig) -> dict[str, _Task]:
    """Path below `staging` -> what writes it, in their order."""
    folder = staging.rpartition("/")[0]
    starts = {part_name(split, number): first for number, first in enumerate(range(0, len(images), data.rows_per_part))}
    return {
        path: _Task(images.section(first, first + data.rows_per_part), storage.join(staging, path), folder, data)
        for path, first in starts.items()
    }


def _written(tasks: Iterable[_Task]) -> Iterator[object]:
    """Write parts as Ray tasks; yields in their order, each time that one is in the store."""
    most = TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    return run_tasks(_write_part, tasks, cpus=1, in_flight=most, ordered=True)


def _write_part(task: _Task) -> None:
    for _ in _write_blocks(task, BadImages(skip=task.data.on_bad_image == "skip"), cores=1):
        pass


def _write_blocks(task: _Task, bad: BadImages, *, cores: int | None) -> Iterator[Rows]:
    """Write a part, and publish it after its last block."""
    shape = image_shape(task.data)
    examples = bad.filter(task.images.stream(cores=cores))
    with storage.scratch_folder(task.near) as scratch:
        file = scratch / "part.parquet"
        with PartWriter(file, shape) as writer:
            while block := take(examples, block_rows(shape)):
                writer.write(block)
                yield block
            writer.note(bad)
        storage.publish_file(file, task.uri)
