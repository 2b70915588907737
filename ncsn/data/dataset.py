"""From a source to a dataset in the store: its rows as Parquet parts, what is learned of them, and its manifest.

Which images a part holds is decided before any of them is read, so any process can write it, and write it again. The
writer of a part notes in it what is known of it, and these notes are combined in order: nothing is read a second time.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ncsn import storage
from ncsn.config.schema import TERMS, DataConfig
from ncsn.data.duplicates import DUPLICATES, Duplicate, below, equal_pairs, named, pairs_of, to_csv
from ncsn.data.format import (
    DIGEST_LENGTH,
    DIGEST_VERSION,
    FORMAT_VERSION,
    MANIFEST,
    NAME,
    NO_HASHES,
    PARQUET_OPTIONS,
    SPLITS,
    Hashes,
    Manifest,
    Part,
    Rows,
    SkippedImage,
    are_among,
    equal_in_words,
    from_table,
    image_hashes,
    load_manifest,
    open_images,
    part_images,
    read_rows,
    schema,
    to_table,
)
from ncsn.data.noise_levels import sample_places, suggestions
from ncsn.data.pixels import PIXELS_VERSION
from ncsn.data.sources.base import BadImages, Source, Split
from ncsn.errors import UserError
from ncsn.progress import Progress

# All other settings of `data`, also those to come, decide which images a dataset has.
_OF_FILES = {"root", "follow_links", "download"}
_WITHOUT_EFFECT = {*_OF_FILES, "dequantize", "horizontal_flip", "augmentation", "num_classes", *TERMS}
LEAST_IMAGES = 2
_BLOCK_BYTES = 2 << 20  # of pixels that are in memory at a time
_NOTES = b"ncsn.notes"


@dataclass(frozen=True)
class Dataset:
    uri: str  # its folder, `<folder>/<digest>`
    manifest: Manifest
    created: bool  # False if it was there already and nothing was written


@dataclass(frozen=True)
class Notes:
    """What is known of a part, which its file holds too."""

    rows: int
    digest: str
    class_counts: list[int]  # up to the largest class
    skipped: list[SkippedImage]  # images that were left out
    conversions: dict[str, int]  # what others lost
    # Test images that equal a training image: name, label, whether "equal" or "mirrored", and the hash of that image.
    left_out: list[tuple[str, int, str, int]]


class Written(NamedTuple):
    notes: Notes
    sample: NDArray[Any]  # the images that the noise levels are found by, [n, H, W, C]
    hashes: Hashes  # of the part's images


@dataclass(frozen=True)
class PartWriter:
    images: Split
    uri: str
    near: str  # folder on the same disk for scratch files
    data: DataConfig
    sampled: NDArray[np.int64]  # rows of the part in its sample, or all if there are fewer

    def write(
        self, known: Hashes = NO_HASHES, *, cores: int | None = None, advance: Callable[[int], object] | None = None
    ) -> Written:
        """Write and publish the part without images of `known` hashes, ascending; `advance` is told of images."""
        pixels, position = self.data.pixels, 0
        block_rows = max(1, _BLOCK_BYTES // pixels.num_bytes)
        bad = BadImages(skip=self.data.on_bad_image == "skip")
        examples = bad.filter(self.images.stream(cores=cores))
        digest: Any = hashlib.sha256()
        labels, sample = np.empty(0, "<i8"), [np.empty((0, *pixels.shape), pixels.dtype)]
        hashes, left_out, root = NO_HASHES, list[tuple[str, int, str, int]](), storage.absolute(self.data.root or "")
        columns = schema(pixels).append(pa.field(NAME, pa.string(), nullable=False))
        with storage.scratch_folder(self.near) as scratch:
            file = scratch / "part.parquet"
            with pq.ParquetWriter(file, columns, **PARQUET_OPTIONS) as writer:
                while rows := list(itertools.islice(examples, block_rows)):
                    images = np.stack([example.image for example in rows])
                    names = [below(root, example.name) for example in rows]
                    own = image_hashes(images)
                    new, either = np.ones(len(own), bool), {"equal": own}
                    if len(known) and self.data.mirrors:
                        either["mirrored"] = image_hashes(images[:, :, ::-1])
                    for kind, found in either.items():
                        for place in np.flatnonzero(new & are_among(found, known)):
                            left_out.append((names[place], rows[place].label, kind, int(found[place])))
                            new[place] = False
                    images, hashes = images[new], np.append(hashes, own[new])
                    if advance:
                        advance(len(rows))
                    if not len(images):
                        continue
                    block = Rows(images, np.array([example.label for example in rows], np.int64)[new])
                    table = to_table(block, pixels.limits)
                    table = table.append_column(columns.field(NAME), [list(itertools.compress(names, new))])
                    writer.write_table(table, row_group_size=len(block))
                    digest.update(images)
                    first, last = np.searchsorted(self.sampled, [position, position + len(block)])
                    sample.append(images[self.sampled[first:last] - position])
                    labels, position = np.append(labels, block.labels), position + len(block)
                digest.update(labels)
                notes = Notes(
                    rows=position,
                    digest=digest.hexdigest(),
                    class_counts=np.bincount(labels[labels >= 0]).tolist(),
                    skipped=bad.skipped,
                    conversions=dict(bad.conversions),
                    left_out=left_out,
                )
                writer.add_key_value_metadata({_NOTES: json.dumps(asdict(notes))})
            storage.publish_file(file, self.uri)
        return Written(notes, np.concatenate(sample), hashes)

    def read(self) -> Written:
        """What `write` gave when the part was written before."""
        with open_images(self.uri, hint="delete it and ingest again") as file:
            fields = json.loads(file.metadata.metadata[_NOTES])
            notes = Notes(**fields | {"skipped": [SkippedImage(**image) for image in fields["skipped"]]})
            groups = map(file.read_row_group, range(file.num_row_groups))
            hashes = np.concatenate([NO_HASHES, *(image_hashes(from_table(group).images) for group in groups)])
            return Written(notes, read_rows(file, self.sampled[self.sampled < notes.rows]).images, hashes)


# Given parts and known images, as `PartWriter.write` gets them.
WriteParts = Callable[[Iterable[PartWriter], Hashes], Iterator[Written]]


def write_dataset(
    source: Source,
    folder: str,
    *,
    name: str,
    data: DataConfig,
    fingerprint: str | None = None,
    write_parts: WriteParts | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Write a source's images as Parquet parts and publish them at `<folder>/<digest>`, unless they are there already.

    The dataset appears whole or not at all.

    Args:
        source: The images.
        folder: URI of the folder that holds all versions of this dataset.
        name: Name of the dataset.
        data: The settings that the source was opened with.
        fingerprint: Of the source's files. With it, an ingestion that was stopped goes on where it was, and files that
            gave a dataset before are not read again. Every writer then reaches `folder`.
        write_parts: Writes parts elsewhere, and yields in their order what `PartWriter.write` gives; None = here.
        progress: Is told of images.
    """
    if fingerprint is None:
        with storage.scratch_folder(folder) as scratch:
            return _write(source, folder, str(scratch), name, data, write_parts, progress or Progress())
    settings = data.model_dump(mode="json", exclude=_WITHOUT_EFFECT) | {"root": data.root, "mirrors": data.mirrors}
    key = storage.digest([fingerprint, settings, PIXELS_VERSION, FORMAT_VERSION], 16)
    receipt, staging = storage.join(folder, f".ingested-{key}.json"), storage.join(folder, f".parts-{key}")
    if (known := _known(folder, receipt)) is not None:
        return known
    try:
        dataset = _write(source, folder, staging, name, data, write_parts, progress or Progress())
    except FileNotFoundError:
        # Another process that ingests the same images was faster and moved the parts to their place.
        if (known := _known(folder, receipt)) is None:
            raise
        return known
    storage.write_json(receipt, {"digest": dataset.manifest.digest})
    storage.delete(staging)
    return dataset


def _known(folder: str, receipt: str) -> Dataset | None:
    """The dataset that these files gave before, if it is still there."""
    try:
        uri = storage.join(folder, storage.read_json(receipt)["digest"])
        return Dataset(uri, load_manifest(uri), created=False)
    except FileNotFoundError:
        return None


def _write(
    source: Source,
    folder: str,
    staging: str,
    name: str,
    data: DataConfig,
    write_parts: WriteParts | None,
    progress: Progress,
) -> Dataset:
    pixels, near = data.pixels, folder if storage.is_local(folder) else staging
    progress.start(sum(map(len, source.splits.values())), "images")
    parts, skipped, conversions = dict[str, list[Part]](), list[SkippedImage](), Counter[str]()
    class_counts = {split: np.zeros(len(source.class_names), np.int64) for split in source.splits}
    chosen = sample_places(len(source.splits["train"]), pixels.num_bytes)
    sample, taken = np.empty((len(chosen), *pixels.shape), pixels.dtype), 0
    counts, repeated, hashes = dict[str, int](), dict[str, int](), dict[str, Hashes]()
    left_out, known = list[tuple[str, int, str, int]](), NO_HASHES
    for split in filter(source.splits.__contains__, SPLITS):
        parts[split], own = [], [NO_HASHES]
        there, sampled = storage.join(staging, split), chosen if split == "train" else chosen[:0]
        found = _parts(there, source.splits[split], sampled, known, near, data, write_parts, progress.advance)
        for file, (notes, some, of_part) in found:
            skipped += notes.skipped
            conversions.update(notes.conversions)
            left_out += notes.left_out
            own.append(of_part)
            if not notes.rows:
                storage.delete(storage.join(there, file))
                continue
            parts[split].append(Part(f"{split}/{file}", notes.rows, notes.digest))
            class_counts[split][: len(notes.class_counts)] += np.array(notes.class_counts, np.int64)
            if split == "train":
                sample[taken : taken + len(some)] = some
                taken += len(some)
        hashes[split] = np.concatenate(own)
        known = np.sort(hashes[split])
        counts[split], repeated[split] = len(known), len(equal_pairs(known))
        if len(known) < LEAST_IMAGES:
            bad = f"{len(skipped)} could not be used" if skipped else ""
            lost = "".join(f"; {why}" for why in (bad, equal_in_words(repeated, counts, left_out=len(left_out))) if why)
            reason = f"gives {len(known)} image(s) for the {split} split, and at least {LEAST_IMAGES} are needed{lost}"
            hint = "add images, or change data.test_fraction"
            raise UserError("data.source", reason, hint=hint, value=data.source)
    progress.advance(len(skipped))
    content = {split: [part.digest for part in found] for split, found in parts.items()}
    identity = {"version": DIGEST_VERSION, "shape": pixels.shape, "class_names": source.class_names, "parts": content}
    identity |= {"dtype": pixels.dtype, "limits": pixels.limits} if pixels.dtype != "uint8" else {}
    uri = storage.join(folder, dataset := storage.digest(identity, DIGEST_LENGTH))
    if storage.exists(storage.join(uri, MANIFEST)):
        return Dataset(uri, load_manifest(uri), created=False)
    manifest = Manifest(
        name=name,
        digest=dataset,
        pixels=pixels,
        counts=counts,
        class_names=list(source.class_names),
        class_counts={split: found.tolist() for split, found in class_counts.items()},
        skipped=skipped,
        parts=parts,
        source=source.description,
        license=data.license or source.license,
        owner=data.owner or "",
        url=data.url or "",
        settings=data.model_dump(mode="json", exclude=_WITHOUT_EFFECT),
        suggested_noise=suggestions(sample[:taken], pixels.limits),
        conversions=dict(sorted(conversions.items())),
        repeated=repeated,
        left_out=len(left_out),
    )
    duplicates = _duplicates(staging, manifest, hashes, left_out)
    storage.write_text(storage.join(staging, DUPLICATES), to_csv(duplicates))
    storage.write_json(storage.join(staging, MANIFEST), {"format_version": FORMAT_VERSION} | asdict(manifest), indent=1)
    created = storage.publish_folder(staging, uri, marker=MANIFEST)
    return Dataset(uri, manifest if created else load_manifest(uri), created)


def _duplicates(
    uri: str, manifest: Manifest, hashes: Mapping[str, Hashes], left_out: Sequence[tuple[str, int, str, int]]
) -> Iterator[Duplicate]:
    """The images that repeat another of their split, and those that were left out of the test split as equal."""
    for split, own in hashes.items():
        yield from pairs_of("equal", *(named(uri, manifest, split, rows) for rows in equal_pairs(own).T))
    order, classes = np.argsort(hashes["train"], kind="stable"), ("", *manifest.class_names)
    places = np.searchsorted(hashes["train"][order], np.array([image[-1] for image in left_out], np.uint64))
    ones = named(uri, manifest, "train", order[places])
    for one, (name, label, kind, _) in zip(ones, left_out, strict=True):
        yield from pairs_of(kind, [one], [(name or "a test image", classes[label + 1])])


def _parts(
    folder: str,
    images: Split,
    sampled: NDArray[np.int64],
    known: Hashes,
    near: str,
    data: DataConfig,
    write_parts: WriteParts | None,
    advance: Callable[[int], object],
) -> Iterator[tuple[str, Written]]:
    """Name of each part of a split and what is known of it, in order; what is in the folder stays."""
    most, there = part_images(data.pixels), set(storage.list_names(folder))
    names = {first: f"part-{number:05d}.parquet" for number, first in enumerate(range(0, len(images), most))}

    def part(first: int) -> PartWriter:  # made when it is its turn: a section may be a copy of the listing
        within = sampled[slice(*np.searchsorted(sampled, [first, first + most]))] - first
        return PartWriter(images.section(first, first + most), storage.join(folder, names[first]), near, data, within)

    missing = (part(first) for first, name in names.items() if name not in there)
    others = write_parts(missing, known) if write_parts else (one.write(known, advance=advance) for one in missing)
    for first, name in names.items():
        written = part(first).read() if name in there else next(others)
        if name in there or write_parts:
            advance(written.notes.rows + len(written.notes.left_out))
        yield name, written
