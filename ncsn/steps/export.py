"""A data set of generated images without copies of training images, by class where the model knows classes.

The images of a class are the samples with `sampling.label` set to it: image i depends on the seed and i alone. Copies
are left out, and the next images of the class take their places.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ncsn import storage
from ncsn.config import Config
from ncsn.config.load import from_yaml
from ncsn.config.schema import MOST_IMAGES
from ncsn.data.format import CLASS_NAMES, PARQUET_OPTIONS, Manifest, class_slug, from_table, load_manifest
from ncsn.data.samples import SampleSet, to_png
from ncsn.data.training_images import open_cache
from ncsn.distributed.cluster import cluster_for, ray_tags
from ncsn.distributed.ray_calls import runner_of
from ncsn.distributed.sampling import make_shards, plan_shards
from ncsn.environment import utc_now
from ncsn.errors import UserError
from ncsn.evaluation import DEVIATIONS, with_interval
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
from ncsn.runs.folder import Run, addresses, opened_from, read_step
from ncsn.steps.register import made_alike, utility_of
from ncsn.steps.results import Context, ExportResult, Prepared
from ncsn.steps.sample import opened, place_of

CARD = "README.md"
MOST_TIMES = 4  # as many images as asked for are made of a class, before its copies are too many
FEWEST = 10  # images of a class that are measured
FILE_IMAGES = 1000  # of a Parquet file
_ENCODED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True)
class Part:
    """The images of one class, or of a model without classes."""

    name: str  # empty without classes
    samples: SampleSet
    chosen: NDArray[np.int64]  # numbers of the samples that are no copies, at most as many as were asked for
    copies: Copies


def prepare(run: Run, *, checkpoint: str, dataset: str) -> Prepared[ExportResult]:
    """How many images of each class there will be, and where."""
    config, trained = opened(run, checkpoint)
    manifest, wish = load_manifest(dataset), config.export
    if manifest.digest != trained.dataset_digest:
        reason = f"{trained.digest} was trained on {trained.dataset_digest[:8]}, not on {manifest.digest[:8]}"
        raise UserError("--dataset", reason, hint="copies are sought among the training images", value=dataset)
    asked = _asked(config, trained)
    if wish.format == "png" and not _fits_png(manifest):
        raise UserError("export.format", f"cannot hold {manifest.pixels}", hint="use parquet", value=wish.format)
    facts, _ = place_of(config, trained, run.folder)
    key = {"checkpoint": trained.digest, **facts, "label": asked, "export": wish.model_dump(mode="json")}
    key["terms"] = terms(config.data, manifest)
    digest = storage.digest({**key, "export": wish.model_dump(mode="json", exclude={"out"})}, 12)
    uri = storage.absolute(wish.out) if wish.out else storage.join(run.folder.exports, digest)
    made = published(uri, digest)
    again = read_step(run.folder, "export").inputs == json.loads(json.dumps(key))
    if wish.out and made is None and not again and config.compute.backend == "local":
        storage.require_output("export.out", uri)
    make = partial(write, config, trained, manifest, asked, checkpoint, dataset, uri, digest)
    work = partial(export, config, trained, manifest, dataset, digest, make if made is None else lambda _: made)
    return Prepared(config, key, work, lambda result: [result.card])


def published(uri: str, digest: str) -> ExportResult | None:
    """The result for the key of this digest that is there, of an attempt that was stopped later or was not the last."""
    card = storage.join(uri, CARD)
    pattern = f"<!-- ncsn export {digest} (.+) -->".encode()
    found = storage.exists(card) and re.search(pattern, storage.read_bytes(card))
    with suppress(ValueError, TypeError):  # of a card that somebody edited
        return ExportResult(uri=uri, card=card, **json.loads(found[1])) if found else None
    return None


def export(
    config: Config,
    trained: TrainedNetwork,
    manifest: Manifest,
    dataset: str,
    digest: str,
    make: Callable[[Context], ExportResult],
    context: Context,
) -> ExportResult:
    """Make the data set, and tell MLflow of it."""
    tracked, result = context.tracked, make(context)
    tracked.log_dataset(f"{config.name}-generated", digest=digest, uri=result.uri, context="export")
    tracked.parent.set_tags({"dataset.digest": manifest.digest, "dataset.uri": dataset})  # of its training still
    tracked.log_metrics({"export/images": sum(result.counts.values()), "export/copies": result.copies})
    tracked.set_tags({"checkpoint.digest": trained.digest, "dataset.digest": manifest.digest, "export.uri": result.uri})
    tracked.log_file(result.card)
    return result


def write(
    config: Config, trained: TrainedNetwork, manifest: Manifest, asked: Mapping[str, int], checkpoint: str,
    dataset: str, uri: str, digest: str, context: Context,
) -> ExportResult:  # fmt: skip
    """Generate and audit the images that are missing, and write those that are no copies, with a card."""
    # What a stopped attempt left. In S3 another one may write the same files right now.
    if not config.export.out and storage.is_local(uri) and not storage.exists(storage.join(uri, CARD)):
        storage.delete(uri)
    tracked = context.tracked
    with cluster_for(config, start=sum(asked.values()) > config.sampling.batch_size, last_lines=context.last_lines):
        tracked.set_tags(ray_tags())
        parts = []
        for name, count in asked.items():
            part = uncopied(config, trained, name, count, checkpoint=checkpoint, dataset=dataset, context=context)
            if (kept := len(part.chosen)) < count:
                made, of = part.samples.count, f" of class {name}" if name else ""
                what = f"of {made:,} images{of} {made - kept:,} are copies"
                raise UserError("export", what, hint="train shorter, or on more images, or ask for fewer")
            parts.append(part)
        distances = _distances(config, manifest, dataset, parts, context)
    made, left_out = sum(part.samples.count for part in parts), sum(part.copies.copies for part in parts)
    whole = replace(parts[0].copies, copies=left_out, num_images=made)  # the test images of all parts are the same
    result = ExportResult(
        uri=uri,
        card=storage.join(uri, CARD),
        counts={part.name: len(part.chosen) for part in parts},
        made=made,
        copies=left_out,
        expected=round(whole.expected * made, 2),
        unclear=str(whole) if whole.unclear else "",
    )
    folder, model = context.folder, opened_from(context.folder)
    again = [shlex.quote(folder.uri)]  # known in any folder, unlike a name
    if not (model and checkpoint.startswith(folder.uri)):
        again.append(f"--checkpoint {shlex.quote(checkpoint)}")
    again += addresses(config)
    base = from_yaml(storage.read_text(folder.config), origin=folder.config)
    wish = config.export.model_copy(update={} if trained.classes else {"num_images": result.counts[""]})
    pairs = ((base.export, wish, {"out"}), (base.sampling, config.sampling, {"label", "num_images"}))
    for section, (usual, now, without) in zip(("export", "sampling"), pairs, strict=True):
        before = usual.model_dump(mode="json")
        for name, value in now.model_dump(mode="json", exclude=without).items():
            if value != before[name]:
                again.append(f"--set {shlex.quote(f'{section}.{name}={json.dumps(value, ensure_ascii=False)}')}")
    making, _ = place_of(config, trained, folder)
    said = read_step(folder, "train").inputs.get("utility", "")  # of a version, of images as it makes them
    if not made_alike(making, sampling_facts(trained.config.sampling, trained.guide)):
        said = ""
    helped = utility_of(folder, trained.digest, making)
    card = render(
        "data_card.md.j2",
        config=config,
        trained=trained,
        manifest=manifest,
        parts=parts,
        distances=distances,
        result=result,
        model=model or folder.run,
        again=" ".join(again),
        shares=[100 * share for share in interval(result.copies, result.made)],
        date=utc_now()[:10],
        version=importlib.metadata.version("ncsn"),
        commit=origin().get("commit"),
        utility=helped["sentence"] if helped else said,
    )
    record = {name: value for name, value in asdict(result).items() if name not in ("uri", "card")}
    comment = json.dumps(record).replace(">", r"\u003e")  # of HTML, for `published`
    with storage.staged_folder(uri, marker=CARD) as staging:
        for part in parts:
            _write(staging, part, manifest, kind=config.export.format)
        if config.export.format == "png" and trained.classes:
            # All classes, so that two exports of a model may be copied into one folder.
            folders = {class_slug(label, manifest.class_names): name for label, name in enumerate(manifest.class_names)}
            (staging / CLASS_NAMES).write_text(json.dumps(folders, ensure_ascii=False, indent=1))
        (staging / CARD).write_text(f"{card}\n<!-- ncsn export {digest} {comment} -->\n")
    return result


def _asked(config: Config, trained: TrainedNetwork) -> dict[str, int]:
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
) -> Part:
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
        _, uri = place_of(own, trained, context.folder)
        make_shards(own, plan_shards(own, checkpoint=checkpoint, folder=uri), progress=progress)
        samples = SampleSet(uri, made)
        found = audit(own, dataset, samples, runner=runner, progress=progress)
        chosen = np.flatnonzero(~found.copied)[:count]
        if len(chosen) == count or made == most:
            return Part(name, samples, chosen, found.copies)
        made = min(made + 2 * (count - len(chosen)), most)


def _distances(config: Config, manifest: Manifest, dataset: str, parts: list[Part], context: Context) -> list[str]:
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


def _write(folder: Path, part: Part, manifest: Manifest, *, kind: str) -> None:
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


def folder_of(part: Part, manifest: Manifest) -> str:
    """The folder of the PNG files of a part; empty without classes."""
    return class_slug(manifest.class_names.index(part.name), manifest.class_names) if part.name else ""


def _fits_png(manifest: Manifest) -> bool:
    return manifest.pixels.dtype == "uint8" and manifest.pixels.shape[2] in (1, 3)
