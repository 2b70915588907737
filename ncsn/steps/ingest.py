"""The images of the configured source as a dataset in the store."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from ncsn import storage
from ncsn.config import Config
from ncsn.data.dataset import Dataset, write_dataset
from ncsn.data.format import MANIFEST, part_images
from ncsn.data.sources import open_source
from ncsn.data.sources.base import source_fingerprint
from ncsn.progress import Progress
from ncsn.steps.step import Step


@dataclass(frozen=True)
class IngestResult:
    """The dataset."""

    uri: str  # its folder in the store
    digest: str  # of its content
    counts: dict[str, int]  # images of each split
    created: bool  # False if the store held this content already, so nothing was written
    repeated: int  # images that equal an earlier one of their split
    left_out: int  # test images that equal a training image
    notes: list[str] = field(default_factory=list)  # on images that were converted or left out, for people


def run(config: Config, *, run: str) -> IngestResult:
    """Bring the source's images to one shape and publish them under the digest of their content."""
    step = Step("ingest", config, run, IngestResult)
    fingerprint = source_fingerprint(config.data)
    inputs = {"data": config.data.model_dump(mode="json"), "files": fingerprint}
    if result := step.find_result(inputs, needs=lambda result: [storage.join(result.uri, MANIFEST)]):
        return result
    with step.work(config) as (progress, tracked):
        # Named after the source, not the experiment, so that experiments on the same images share one dataset.
        datasets = storage.join(step.folder.root, "datasets", config.data.source)
        dataset = write_images(config, datasets, fingerprint=fingerprint, progress=progress)
        manifest = dataset.manifest
        tracked.log_dataset(manifest.name, digest=manifest.digest, uri=dataset.uri)
        tracked.log_metrics({f"ingest/{split}_images": count for split, count in manifest.counts.items()})
    notes = [f"{count} images were {what}" for what, count in manifest.conversions.items()]
    if manifest.unlabeled:
        notes.append(f"{manifest.unlabeled} images have no label, unlike the others; each is kept with label -1")
    if manifest.skipped:
        notes.append(f"{len(manifest.skipped)} images could not be used; the first is {manifest.skipped[0].name}")
    notes += filter(None, [manifest.equal_images])
    equal = {"repeated": sum(manifest.repeated.values()), "left_out": manifest.left_out}
    counts = dict(manifest.counts)
    return step.store_result(IngestResult(dataset.uri, manifest.digest, counts, dataset.created, notes=notes, **equal))


def write_images(
    config: Config, folder: str, *, fingerprint: str | None = None, progress: Progress | None = None
) -> Dataset:
    """Write the images of the config's source as a dataset below the URI `folder`, on Ray where that is faster."""
    data, source = config.data, open_source(config.data)
    most = part_images(data.pixels)
    large = any(split.in_tasks and len(split) > most for split in source.splits.values())  # one part is one task
    cluster: AbstractContextManager[object] = nullcontext()
    writer = None
    if large:
        # Imported here: ray takes a second, which a small source need not wait for.
        from ncsn.distributed.cluster import ray_cluster
        from ncsn.distributed.ray_calls import few_cores, write_parts

        if not few_cores():
            cluster, writer = ray_cluster(config), write_parts
    with cluster:
        return write_dataset(
            source,
            folder,
            name=data.source,
            data=data,
            fingerprint=fingerprint or source_fingerprint(data) if large else None,
            write_parts=writer,
            progress=progress,
        )
