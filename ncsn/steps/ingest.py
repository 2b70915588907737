"""The images of the configured source as a dataset in the store."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ncsn import storage
from ncsn.config import Config, to_yaml
from ncsn.config.schema import TERMS
from ncsn.data.dataset import Dataset, write_dataset
from ncsn.data.duplicates import DUPLICATES, Duplicate, from_csv, in_two_classes, named, pairs_of, to_csv
from ncsn.data.format import MANIFEST, Hashes, Manifest, image_hashes, load_manifest, part_images, read_part
from ncsn.data.sources import open_source
from ncsn.data.sources.base import NO_FILES, source_fingerprint
from ncsn.progress import Progress, say
from ncsn.runs.layout import Store
from ncsn.runs.record import ForeignRun, read_finished, write_finished
from ncsn.runs.results import IngestResult
from ncsn.runs.run import Run
from ncsn.steps.prepared import Context, Prepared


def prepare(run: Run) -> Ingest:
    """The names, sizes and dates of the source's files decide; `ForeignRun` if the run has read other images."""
    return Ingest(run.config, _agreed_key(run))


@dataclass(frozen=True)
class Ingest(Prepared[IngestResult]):
    """The images of the config's source, brought to one shape and published under the digest of their content."""

    def work(self, context: Context) -> IngestResult:
        dataset = write_images(
            self.config, context.folder.root, fingerprint=self.key["files"], progress=context.progress
        )
        manifest = dataset.manifest
        context.tracked.log_dataset(manifest.name, digest=manifest.digest, uri=dataset.uri)
        context.tracked.log_metrics({f"ingest/{split}_images": count for split, count in manifest.counts.items()})
        notes = [f"{count:,} images were {what}" for what, count in manifest.conversions.items()]
        if manifest.unlabeled:
            notes.append(f"{manifest.unlabeled:,} images have no label, unlike the others; each is kept with label -1")
        if manifest.skipped:
            notes.append(f"{len(manifest.skipped):,} images could not be used; the first is {manifest.skipped[0].name}")
        notes += filter(None, [manifest.equal_images])
        found = [*_near_duplicates(self.config, dataset.uri, manifest, context)]
        uri = storage.join(dataset.uri, DUPLICATES)
        known = storage.read_text(uri) if storage.exists(uri) else ""
        duplicates = [*(each for each in from_csv(known) if each.kind != "near"), *found]
        if (text := to_csv(duplicates)) != known:
            storage.write_text(uri, text)
        if found:
            notes.append(
                f"{len(found):,} test images nearly equal a training image, see {uri}: remove one of each pair"
            )
        notes += filter(None, [in_two_classes(duplicates)])
        if duplicates:
            context.tracked.log_file(uri)
        return ingested(dataset.uri, manifest, created=dataset.created, notes=notes)

    def files(self, result: IngestResult) -> list[str]:
        return [storage.join(result.uri, MANIFEST)]


def ingested(uri: str, manifest: Manifest, *, created: bool, notes: Sequence[str] = ()) -> IngestResult:
    """What a dataset of the store says as the result of the step."""
    return IngestResult(
        uri=uri,
        digest=manifest.digest,
        counts=dict(manifest.counts),
        created=created,
        repeated=sum(manifest.repeated.values()),
        left_out=manifest.left_out,
        notes=list(notes),
    )


def _near_duplicates(config: Config, dataset: str, manifest: Manifest, context: Context) -> Iterator[Duplicate]:
    """Training images that test images nearly equal, with a picture."""
    # Imported here: torch takes seconds, which a launcher that finds its dataset need not wait for.
    from ncsn.data.training_images import CachedSplit, open_cache, open_training_images
    from ncsn.evaluation.audit import compared_tests
    from ncsn.evaluation.features import here
    from ncsn.report.images import neighbors_png

    if not isinstance(open_training_images(dataset), CachedSplit):
        return  # so many images that a copy of all of them is left to the evaluation
    *_, pairs = compared_tests(config, dataset, runner=here, progress=context.progress)
    if len(pairs):
        test, train = (open_cache(dataset, split, as_bytes=True).images for split in ("test", "train"))
        uri = storage.join(dataset, "near_duplicates.png")
        storage.write_bytes(uri, neighbors_png(test[pairs[:16, 0]], train[pairs[:16, 1]]))
        context.tracked.log_file(uri)
    tests, near = pairs.T
    yield from pairs_of("near", named(dataset, manifest, "train", near), named(dataset, manifest, "test", tests))


def _agreed_key(run: Run) -> Mapping[str, Any]:
    """What decides the dataset of the run; `ForeignRun`, with nothing changed, if it has read other images.

    Names, sizes and dates of the source are compared with those at that time. Where they differ the images are read.
    The same images in another place are those of the run, whose config names the place from now on.
    """
    config, folder = run.config, run.folder
    settings = config.data.model_dump(mode="json", exclude=TERMS)
    key: dict[str, Any] = {"data": settings, "files": source_fingerprint(config.data)}
    finished = read_finished(folder, IngestResult.step)
    if finished is None or finished.key == key:
        return key
    before, stored = finished.key, finished.result
    owner, here = run.owner, config.data.root
    places = (before["data"]["root"], owner.data.root)
    key["data"]["root"] = before["data"]["root"]
    if key["files"] == NO_FILES and key["data"] == before["data"] and here in places:  # the source is away
        return before
    if key["files"] != before["files"]:
        say(f"data.root is not as run {folder.run} has read it: reading the images, to compare them")
        found = write_images(config, folder.root, fingerprint=key["files"])
        if (digest := found.manifest.digest) != stored.digest:
            difference = f"has read other images than those of data.root: {_difference(stored.uri, found.uri)}"
            hint = f"choose another --run NAME, such as --run {config.name}-{digest[:8]}"
            raise ForeignRun("--run", difference, hint=hint, value=folder.run)
    if owner.data.root != here:
        data = owner.data.model_copy(update={"root": here})
        storage.write_text(folder.config, to_yaml(owner.model_copy(update={"data": data})))
    write_finished(folder, replace(finished, key=key))
    return key


def _difference(before: str, after: str) -> str:
    """How many images of each dataset the other lacks."""
    if not storage.exists(storage.join(before, MANIFEST)):
        return "how many is not known, since its dataset is gone"

    def hashes(uri: str) -> Hashes:
        manifest = load_manifest(uri)
        parts = itertools.chain.from_iterable(manifest.parts.values())
        blocks = (rows.images for part in parts for rows in read_part(uri, part, manifest.pixels))
        return np.concatenate([image_hashes(images) for images in blocks])

    old, new = hashes(before), hashes(after)
    added, gone = (np.isin(one, other, invert=True).sum() for one, other in ((new, old), (old, new)))
    return (
        f"{added:,} are new, {gone:,} are gone" if added or gone else "equal ones have other names, classes or numbers"
    )


def write_images(
    config: Config, root: str, *, fingerprint: str | None = None, progress: Progress | None = None
) -> Dataset:
    """Write the images of the config's source as a dataset of the store `root`, on Ray where that is faster."""
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
            # Named after the source, not the experiment, so that experiments on the same images share one dataset.
            storage.join(Store(root).datasets, data.source),
            name=data.source,
            data=data,
            fingerprint=fingerprint or source_fingerprint(data) if large else None,
            write_parts=writer,
            progress=progress,
        )
