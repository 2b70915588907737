"""After training, if asked: which checkpoint generates the best images, by the samples of each (Song & Ermon 2019).

The samples of all candidates come from the same noise, so their differences are surer than their values. Each score is
stored as it is known, so that a second call continues an interrupted one.

    <run>/selection/<how>/<weights>.json    a score
    <run>/selection/candidates.json         all of them and the choice
    <run>/selected/images-000050000/        copies of the best ones, to sample from
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from ncsn import storage
from ncsn.config import Config
from ncsn.core.keyed_random import COMMON_SEED
from ncsn.data.format import Manifest, load_manifest
from ncsn.distributed.cluster import cluster_for, ray_tags
from ncsn.distributed.ray_calls import runner_of
from ncsn.distributed.sampling import sample_features
from ncsn.errors import NotFound, UserError
from ncsn.evaluation import evaluation_of
from ncsn.evaluation.measure import metric_name
from ncsn.evaluation.reference import Evaluator, open_evaluator
from ncsn.evaluation.scores import kernel_distance
from ncsn.model.averages import Weights, find_weights, keep_copy
from ncsn.report.plots import selection_figure, to_png
from ncsn.report.words import few_samples
from ncsn.runs.folder import Run, RunFolder
from ncsn.steps.address import keep_guide
from ncsn.steps.results import Context, Prepared, SelectResult
from ncsn.steps.train import settle_noise

KEPT = 3  # of the best candidates, in the run's folder selected/


def prepare(run: Run, *, dataset: str) -> Prepared[SelectResult]:
    """The weights of every checkpoint of the run, and of every average that was put together, and how they are scored.

    A second call continues: the scores that are known stay.
    """
    manifest = load_manifest(dataset)
    config = keep_guide(settle_noise(run, manifest), run.folder)
    found = find_weights(run.folder)
    if not found:
        raise NotFound(run.folder.checkpoints, "no checkpoint", hint="run `ncsn train` first")
    key = {"weights": [each.digest for each in found], "scored": _scored_by(config, manifest)}
    work = partial(select, config, manifest, dataset, found)
    return Prepared(config, key, work, lambda result: [result.uri, result.plot, *result.kept])


def select(
    config: Config, manifest: Manifest, dataset: str, found: Sequence[Weights], context: Context
) -> SelectResult:
    """Score every candidate by a few samples, and choose."""
    progress, tracked = context.progress, context.tracked
    at_once = min(config.compute.max_workers, len(found))
    with cluster_for(config, start=at_once > 1, last_lines=context.last_lines):
        tracked.set_tags({**ray_tags(), "dataset.digest": manifest.digest, "dataset.uri": dataset})
        evaluator = open_evaluator(config, dataset, runner=runner_of(config.compute))
        values = {}
        progress.start(len(found), "candidates")
        for weights, value in scores(config, found, evaluator, folder=context.folder, dataset=dataset):
            values[weights.digest] = value
            progress.advance()
    result = conclude(config, found, values, folder=context.folder, extractor=evaluator.name)
    tracked.log_metrics({result.figure: result.value}, result.images_seen)
    for uri in (result.uri, result.plot):
        tracked.log_file(uri)
    return result


def _scored_by(config: Config, manifest: Manifest) -> dict[str, Any]:
    """What decides the score of some weights."""
    return {
        "select": config.select.model_dump(mode="json"),
        "sampling": config.sampling.model_dump(
            mode="json", exclude={"num_images", "batch_size", "seed", "relative_width"}
        ),
        "evaluation": evaluation_of(config, manifest).model_dump(mode="json"),
        "dataset": manifest.digest,
    }


def scores(
    config: Config, found: Sequence[Weights], evaluator: Evaluator, *, folder: RunFolder, dataset: str
) -> Iterator[tuple[Weights, float | None]]:
    """Each candidate with its score, as they are known; None if an image is not finite."""
    how = storage.digest(storage.relative_uris(_scored_by(config, load_manifest(dataset)), folder.root), 12)
    places = [storage.join(folder.selection, how, f"{each.digest}.json") for each in found]
    missing = []
    for number, (weights, place) in enumerate(zip(found, places, strict=True)):
        if (known := storage.find_json(place)) is not None:
            yield weights, known["value"]
        else:
            missing.append(number)
    settings = config.select
    sampling = config.sampling.model_copy(update={"seed": settings.seed})
    candidates = [(found[number].uri, sampling) for number in missing]
    made = sample_features(config, candidates, dataset=dataset, num_images=settings.num_images)
    for index, features in made:
        value = None
        if features is not None and settings.figure == "fid":
            value = evaluator.distance(features)
        elif features is not None:
            value, _ = kernel_distance(features, evaluator.reference.features, seed=COMMON_SEED)
        storage.write_json(places[missing[index]], {"value": value})
        yield found[missing[index]], value


def conclude(
    config: Config, found: Sequence[Weights], values: dict[str, float | None], *, folder: RunFolder, extractor: str
) -> SelectResult:
    """Choose, copy the best candidates, and write the table and its plot."""
    settings = config.select
    rows = [{**asdict(each), "value": values[each.digest]} for each in found]
    finite = (row for row in rows if row["value"] is not None)
    ranked = sorted(finite, key=lambda row: (row["value"], row["images_seen"]))
    if not ranked:
        wrong = f"all {len(rows)} candidates give images that are not finite"
        raise UserError("sampling.sampler", wrong, hint="lower its step size")
    metric = metric_name(settings.figure, extractor=extractor, num_images=settings.num_images)
    kept = [keep_copy(row["uri"], folder.selected) for row in ranked[:KEPT]]
    optimistic = (
        f"{metric} chose among {len(rows)} candidates, so the winning score is optimistic; the metrics use new samples"
    )
    result = SelectResult(
        uri=storage.join(folder.selection, "candidates.json"),
        plot=storage.join(folder.selection, "candidates.png"),
        checkpoint=kept[0],
        figure=metric,
        value=ranked[0]["value"],
        images_seen=ranked[0]["images_seen"],
        relative_width=ranked[0]["relative_width"],
        candidates=rows,
        kept=kept,
        notes=[optimistic, *filter(None, [few_samples(metric)])],
    )
    storage.write_json(result.uri, storage.relative_uris(asdict(result), folder.root), indent=1)
    storage.write_bytes(result.plot, to_png(selection_figure(rows, metric=metric)))
    return result
