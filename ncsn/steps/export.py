"""A data set of generated images without copies of training images, by class where the model knows classes.

The images of a class are the samples with `sampling.label` set to it: image i depends on the seed and i alone. Copies
are left out, and the next images of the class take their places.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ncsn import storage
from ncsn.clock import utc_now
from ncsn.config import Config
from ncsn.config.load import from_yaml
from ncsn.config.schema import MOST_IMAGES
from ncsn.data.format import CLASS_NAMES, PARQUET_OPTIONS, Manifest, class_slug, from_table, load_manifest
from ncsn.data.samples import SampleSet, to_png
from ncsn.data.training_images import open_cache
from ncsn.distributed.cluster import cluster_for, ray_tags
from ncsn.distributed.ray_calls import runner_of
from ncsn.distributed.sampling import make_shards, plan_shards
from ncsn.errors import UserError
from ncsn.evaluation import DEVIATIONS
from ncsn.evaluation.audit import audit
from ncsn.evaluation.copies import Copies, interval
from ncsn.evaluation.features import extract_set
from ncsn.evaluation.reference import open_evaluator
from ncsn.evaluation.scores import kernel_distance
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.classes import AS_DATA, BALANCED
from ncsn.model.generate import sampling_facts
from ncsn.report.pages import render
from ncsn.report.words import terms
from ncsn.runs.code import origin
from ncsn.runs.layout import RunFolder, addresses
from ncsn.runs.metrics import with_interval
from ncsn.runs.record import read_finished, read_result, version_of
from ncsn.runs.results import ExportResult, RegisterResult
from ncsn.runs.run import Run
from ncsn.steps.prepared import Context, Prepared
from ncsn.steps.register import made_alike, utility_of
from ncsn.steps.sample import open_checkpoint, samples_of

CARD = "README.md"
MOST_TIMES = 4  # as many images as asked for are made of a class, before its copies are too many
FEWEST = 10  # images of a class that are measured
FILE_IMAGES = 1000  # of a Parquet file
_ENCODED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True)
class ClassImages:
    """The images of one class, or of a model without classes."""

    name: str  # empty without classes
    samples: SampleSet
    chosen: NDArray[np.int64]  # numbers of the samples that are no copies, at most as many as were asked for
    copies: Copies


def prepare(run: Run, *, checkpoint: str, dataset: str) -> Export:
    """How many images of each class there will be, and where."""
    config, trained = open_checkpoint(run, checkpoint)
    manifest, wish = load_manifest(dataset), config.export
    if manifest.digest != trained.dataset_digest:
        reason = f"{trained.digest} was trained on {trained.dataset_digest[:8]}, not on {manifest.digest[:8]}"
        raise UserError("--dataset", reason, hint="copies are sought among the training images", value=dataset)
    counts = _counts(config, trained)
    if wish.format == "png" and not _fits_png(manifest):
        raise UserError("export.format", f"cannot hold {manifest.pixels}", hint="use parquet", value=wish.format)
    facts, _ = samples_of(config, trained, run.folder)
    key = {"checkpoint": trained.digest, **facts, "label": counts, "export": wish.model_dump(mode="json")}
    key["terms"] = terms(config.data, manifest)
    digest = storage.digest({**key, "export": wish.model_dump(mode="json", exclude={"out"})}, 12)
    uri = storage.absolute(wish.out) if wish.out else storage.join(run.folder.exports, digest)
    made = published(uri, digest)
    stored = read_finished(run.folder, ExportResult.step)
    again = stored is not None and stored.key == json.loads(json.dumps(key))
    if wish.out and made is None and not again and config.compute.backend == "local":
        storage.require_output("export.out", uri)
    return Export(config, key, trained, manifest, counts, checkpoint, dataset, uri, digest, made)


def published(uri: str, digest: str) -> ExportResult | None:
    """The result for the key of this digest that is there, of an attempt that was stopped later or was not the last."""
    card = storage.join(uri, CARD)
    pattern = f"<!-- ncsn export {digest} (.+) -->".encode()
    found = storage.exists(card) and re.search(pattern, storage.read_bytes(card))
    with suppress(ValueError, TypeError):  # of a card that somebody edited
        return ExportResult(uri=uri, card=card, **json.loads(found[1])) if found else None
    return None


@dataclass(frozen=True)
class Export(Prepared[ExportResult]):
    """Makes the data set, unless it is there, and tells MLflow of it."""

    trained: TrainedNetwork
    manifest: Manifest  # of the dataset
    counts: Mapping[str, int]  # images of each class
    checkpoint: str  # URI
    dataset: str  # URI
    uri: str  # folder of the data set
    digest: str  # of all that decides it
    made: ExportResult | None  # what is there

    def work(self, context: Context) -> ExportResult:
        tracked, result = context.tracked, self.made or self._make(context)
        tracked.log_dataset(f"{self.config.name}-generated", digest=self.digest, uri=result.uri, context="export")
        data = {"dataset.digest": self.manifest.digest}
        tracked.parent.set_tags({**data, "dataset.uri": self.dataset})  # of its training still
        tracked.log_metrics({"export/images": sum(result.counts.values()), "export/copies": result.copies})
        tracked.set_tags({"checkpoint.digest": self.trained.digest, **data, "export.uri": result.uri})
        tracked.log_file(result.card)
        return result

    def _make(self, context: Context) -> ExportResult:
        """Generate and audit the images that are missing, and write those that are no copies, with a card."""
        config = self.config
        # What a stopped attempt left. In S3 another one may write the same files right now.
        if not config.export.out and storage.is_local(self.uri) and not storage.exists(storage.join(self.uri, CARD)):
            storage.delete(self.uri)
        many = sum(self.counts.values()) > config.sampling.batch_size
        with cluster_for(config, start=many, last_lines=context.last_lines):
            context.tracked.set_tags(ray_tags())
            parts = [self._part(name, count, context) for name, count in self.counts.items()]
            distances = _distances(config, self.manifest, self.dataset, parts, context)
        made = sum(part.samples.count for part in parts)
        left_out = sum(part.copies.copies for part in parts)
        whole = replace(parts[0].copies, copies=left_out, num_images=made)  # the test images of all parts are the same
        result = ExportResult(
            uri=self.uri,
            card=storage.join(self.uri, CARD),
            counts={part.name: len(part.chosen) for part in parts},
            made=made,
            copies=left_out,
            expected=round(whole.expected * made, 2),
            unclear=str(whole) if whole.unclear else "",
        )
        card = self._card(result, parts, distances, context.folder)
        record = {name: value for name, value in result.plain().items() if name not in ("uri", "card")}
        comment = json.dumps(record).replace(">", r"\u003e")  # of HTML, for `published`
        with storage.staged_folder(self.uri, marker=CARD) as staging:
            for part in parts:
                _write(staging, part, self.manifest, kind=config.export.format)
            if config.export.format == "png" and self.trained.classes:
                # All classes, so that two exports of a model may be copied into one folder.
                names = self.manifest.class_names
                folders = {class_slug(label, names): name for label, name in enumerate(names)}
                (staging / CLASS_NAMES).write_text(json.dumps(folders, ensure_ascii=False, indent=1))
            (staging / CARD).write_text(f"{card}\n<!-- ncsn export {self.digest} {comment} -->\n")
        return result

    def _part(self, name: str, count: int, context: Context) -> ClassImages:
        """So many images of a class; `UserError` if too many of those that were made are copies."""
        part = uncopied(
            self.config,
            self.trained,
            name,
            count,
            checkpoint=self.checkpoint,
            dataset=self.dataset,
            context=context,
        )
        if (kept := len(part.chosen)) < count:
            made = part.samples.count
            what = f"of {made:,} images{f' of class {name}' if name else ''} {made - kept:,} are copies"
            raise UserError("export", what, hint="train shorter, or on more images, or ask for fewer")
        return part

    def _card(
        self, result: ExportResult, parts: Sequence[ClassImages], distances: Sequence[str], folder: RunFolder
    ) -> str:
        """The page of the data set, with the command that makes it again."""
        config, model = self.config, version_of(folder)
        again = [shlex.quote(folder.uri)]  # known in any folder, unlike a name
        if not (model and self.checkpoint.startswith(folder.uri)):
            again.append(f"--checkpoint {shlex.quote(self.checkpoint)}")
        again += addresses(config)
        base = from_yaml(storage.read_text(folder.config), origin=folder.config)
        wish = config.export.model_copy(update={} if self.trained.classes else {"num_images": result.counts[""]})
        for section, usual, now, without in (
            ("export", base.export, wish, {"out"}),
            ("sampling", base.sampling, config.sampling, {"label", "num_images"}),
        ):
            before = usual.model_dump(mode="json")
            for name, value in now.model_dump(mode="json", exclude=without).items():
                if value != before[name]:
                    again.append(f"--set {shlex.quote(f'{section}.{name}={json.dumps(value, ensure_ascii=False)}')}")
        making, _ = samples_of(config, self.trained, folder)
        helped = utility_of(folder, self.trained.digest, making)
        return render(
            "data_card.md.j2",
            config=config,
            trained=self.trained,
            manifest=self.manifest,
            parts=parts,
            distances=distances,
            result=result,
            model=model or folder.run,
            again=" ".join(again),
            shares=[100 * share for share in interval(result.copies, result.made)],
            date=utc_now()[:10],
            version=importlib.metadata.version("ncsn"),
            commit=origin().get("commit"),
            utility=helped.sentence if helped else self._said_of_version(folder, making),
        )

    def _said_of_version(self, folder: RunFolder, making: Mapping[str, Any]) -> str:
        """What was said of the images of the version that was opened as this run, if these are made as they were."""
        registered = read_result(folder, RegisterResult) if version_of(folder) else None
        as_then = made_alike(making, sampling_facts(self.trained.config.sampling, self.trained.guide))
        return registered.utility if registered and as_then else ""


def _counts(config: Config, trained: TrainedNetwork) -> dict[str, int]:
    """Images of each class, in the order of the classes; of all under an empty name, without classes."""
    wish, classes = config.export, trained.classes
    if classes is None:
        for key, value in wish.model_dump(include={"per_class", "classes", "fill"}, exclude_defaults=True).items():
            reason, hint = "this model knows no classes", "use export.num_images"
            raise UserError(f"export.{key}", reason, hint=hint, value=value)
        return {"": wish.num_images or config.sampling.num_images}
    hint = "use export.per_class, export.classes or export.fill"
    if wish.num_images:
        raise UserError("export.num_images", "this model knows classes", hint=hint, value=wish.num_images)
    most = max(classes.counts)
    asked = {
        name: most - count if wish.fill else wish.per_class or 0
        for name, count in zip(classes.names, classes.counts, strict=True)
    }
    for name, count in wish.classes.items():
        asked[classes.names[classes.index(name, key="export.classes")]] = count
    if not any(asked.values()):
        raise UserError("export", "asks for no images", hint=hint)
    return {name: count for name, count in asked.items() if count}


def uncopied(
    config: Config, trained: TrainedNetwork, name: str, count: int, *, checkpoint: str, dataset: str, context: Context
) -> ClassImages:
    """Images of a class without copies, as many as are asked for, or fewer of a model that makes hardly anything else.

    Those that are there are not made again.
    """
    made, most, progress = count, min(MOST_TIMES * count, MOST_IMAGES), context.progress
    runner = runner_of(config.compute)
    while True:
        changes: dict[str, Any] = {"num_images": made}
        if trained.classes is not None:  # by its number where the name means something else
            changes["label"] = str(trained.classes.names.index(name)) if name in (BALANCED, AS_DATA) else name
        own = config.model_copy(update={"sampling": config.sampling.model_copy(update=changes)})
        _, uri = samples_of(own, trained, context.folder)
        make_shards(own, plan_shards(own, checkpoint=checkpoint, folder=uri), progress=progress)
        samples = SampleSet(uri, made)
        found = audit(own, dataset, samples, runner=runner, progress=progress)
        chosen = np.flatnonzero(~found.copied)[:count]
        if len(chosen) == count or made == most:
            return ClassImages(name, samples, chosen, found.copies)
        made = min(made + 2 * (count - len(chosen)), most)


def _distances(
    config: Config, manifest: Manifest, dataset: str, parts: Sequence[ClassImages], context: Context
) -> list[str]:
    """The kernel distance to the training images with its interval: of the first images made, and of the chosen.

    It is the mean over classes of `FEWEST` images or more, each compared with its own.
    """
    runner, progress = runner_of(config.compute), context.progress
    progress.start(sum(part.samples.count for part in parts), "images, measured")
    real = open_evaluator(config, dataset, runner=runner, progress=progress).reference.features
    labels = open_cache(dataset, config.evaluation.reference_split).labels
    before, after = list[tuple[float, float]](), list[tuple[float, float]]()
    for part in parts:
        features = extract_set(config, dataset, part.samples, runner=runner, progress=progress).features
        own = real[labels == manifest.class_names.index(part.name)] if part.name else real
        if min(len(own), len(part.chosen)) >= FEWEST:
            before.append(kernel_distance(features[: len(part.chosen)], own))
            after.append(kernel_distance(features[part.chosen], own))
    shown = []
    for values, deviations in (np.transpose(each) for each in (before, after) if each):
        value, reach = values.mean(), DEVIATIONS * np.linalg.norm(deviations) / len(values)
        shown.append(with_interval(value, value - reach, value + reach))
    return shown


def _write(folder: Path, part: ClassImages, manifest: Manifest, *, kind: str) -> None:
    """PNG files in a folder of the class, or Parquet files named after it.

    Parquet files are as `datasets` has images and classes, or, where PNG cannot hold the pixels, as this project's.
    """
    names, name = list(manifest.class_names) if part.name else [], folder_of(part, manifest)
    features = {"image": {"_type": "Image"}} | ({"label": {"names": names, "_type": "ClassLabel"}} if names else {})
    known = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    for first in range(0, part.samples.count, FILE_IMAGES):
        last = min(first + FILE_IMAGES, part.samples.count)
        numbers = part.chosen[(part.chosen >= first) & (part.chosen < last)]
        rows = part.samples.table(first, last).take(numbers - first)
        file = folder / f"{name or 'images'}-{first:06d}.parquet"
        if not _fits_png(manifest):
            pq.write_table(rows, file, **PARQUET_OPTIONS)
            continue
        pngs = [to_png(image) for image in from_table(rows).images]
        if kind == "png":
            (folder / name).mkdir(exist_ok=True)
            for number, png in zip(numbers, pngs, strict=True):
                (folder / name / f"generated-{number:06d}.png").write_bytes(png)
        else:
            column = pa.array([{"bytes": png, "path": None} for png in pngs], _ENCODED)
            columns = {"image": column} | ({"label": rows.column("label")} if names else {})
            pq.write_table(pa.table(columns).replace_schema_metadata(known), file)


def folder_of(part: ClassImages, manifest: Manifest) -> str:
    """The folder of the PNG files of a part; empty without classes."""
    return class_slug(manifest.class_names.index(part.name), manifest.class_names) if part.name else ""


def _fits_png(manifest: Manifest) -> bool:
    return manifest.pixels.dtype == "uint8" and manifest.pixels.shape[2] in (1, 3)
