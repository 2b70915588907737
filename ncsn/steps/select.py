"""After training, if asked: which checkpoint generates the best images, by the samples of each (Song & Ermon 2019).

The samples of all candidates come from the same noise, so their differences are surer than their values. The last one
stays unless another is surely better, however many are compared. Each score is stored as it is known, so that a second
call continues an interrupted one.

    <run>/selection/<how>/<weights>.json    a score
    <run>/selection/candidates.json         all of them and the choice
    <run>/selected/images-000050000/        copies of the best that are surely better than the last, to sample from
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import t

from ncsn import storage
from ncsn.config import Config
from ncsn.core.keyed_random import COMMON_SEED
from ncsn.data.format import Manifest, load_manifest
from ncsn.distributed.cluster import cluster_for, ray_tags
from ncsn.distributed.ray_calls import runner_of
from ncsn.distributed.sampling import Features, sample_features
from ncsn.errors import NotFound, UserError
from ncsn.evaluation import DEVIATIONS, classes_in_turn, evaluation_of
from ncsn.evaluation.frechet import frechet_without, groups_of, jackknife_deviation
from ncsn.evaluation.reference import Evaluator, open_evaluator
from ncsn.evaluation.scores import kernel_distances
from ncsn.model.checkpoint import load_checkpoint, save_network
from ncsn.report.plots import selection_figure, to_png
from ncsn.report.words import few_samples, shown_score
from ncsn.runs.layout import INDEX, RunFolder, images_seen_at
from ncsn.runs.metrics import metric_name
from ncsn.runs.results import SelectResult
from ncsn.runs.run import Run
from ncsn.steps.address import keep_guide
from ncsn.steps.prepared import Context, Prepared
from ncsn.steps.train import settle_noise

KEPT = 3  # at most, in the run's folder selected/
SURE = 0.05  # as of 95 % intervals, for all comparisons with the last together

Score = dict[str, Any]  # see `_score`


@dataclass(frozen=True)
class Weights:
    """EMA weights to sample from."""

    uri: str  # a checkpoint
    digest: str  # first 16 hex digits of the SHA-256 of the weights
    images_seen: int


def find_weights(folder: RunFolder) -> list[Weights]:
    """All different EMA weights of a run, by images seen; of the same ones the first place."""
    found: dict[str, Weights] = {}
    for place in (folder.checkpoints, folder.selected):
        for name in filter(re.compile(r"images-\d+").fullmatch, storage.list_names(place)):
            uri = storage.join(place, name)
            index = storage.find_json(storage.join(uri, INDEX))
            if index is not None:
                digest = index["sha256"]["ema.safetensors"][:16]
                found.setdefault(digest, Weights(uri, digest, images_seen_at(name)))
    return sorted(found.values(), key=lambda each: each.images_seen)


def keep_copy(uri: str, folder: str) -> str:
    """URI of a copy of a checkpoint below `folder`, with what images need, that no training thins or deletes."""
    place, _, name = uri.rpartition("/")
    if place == folder:
        return uri
    target = storage.join(folder, name)
    with storage.scratch_folder(folder) as copy:
        save_network(load_checkpoint(uri), copy)
        storage.publish_folder(copy, target, marker=INDEX, replace=True)
    return target


def prepare(run: Run, *, dataset: str) -> Select:
    """The weights of every checkpoint of the run, and how they are scored.

    A second call continues: the scores that are known stay.
    """
    manifest = load_manifest(dataset)
    config = keep_guide(settle_noise(run, manifest), run.folder)
    found = find_weights(run.folder)
    if not found:
        raise NotFound(run.folder.checkpoints, "no checkpoint", hint="run `ncsn train` first")
    key = {"weights": [each.digest for each in found], "scored": _scored_by(config, manifest)}
    return Select(config, key, manifest, dataset, found)


@dataclass(frozen=True)
class Select(Prepared[SelectResult]):
    """Scores every candidate by a few samples, and chooses."""

    manifest: Manifest
    dataset: str  # URI
    found: Sequence[Weights]  # the candidates

    def work(self, context: Context) -> SelectResult:
        progress, tracked = context.progress, context.tracked
        at_once = min(self.config.compute.max_workers, len(self.found))
        with cluster_for(self.config, start=at_once > 1, last_lines=context.last_lines):
            tracked.set_tags({**ray_tags(), "dataset.digest": self.manifest.digest, "dataset.uri": self.dataset})
            evaluator = open_evaluator(self.config, self.dataset, runner=runner_of(self.config.compute))
            scored = {}
            progress.start(len(self.found), "candidates")
            each = scores(self.config, self.found, evaluator, folder=context.folder, dataset=self.dataset)
            for weights, score in each:
                scored[weights.digest] = score
                progress.advance()
        result = conclude(self.config, self.found, scored, folder=context.folder, extractor=evaluator.name)
        tracked.log_metrics({result.figure: result.value}, result.images_seen)
        for uri in (result.uri, result.plot):
            tracked.log_file(uri)
        return result


def _scored_by(config: Config, manifest: Manifest) -> dict[str, Any]:
    """What decides the score of some weights."""
    return {
        "select": config.select.model_dump(mode="json"),
        "sampling": config.sampling.model_dump(mode="json", exclude={"num_images", "batch_size", "seed"}),
        "evaluation": evaluation_of(config, manifest).model_dump(mode="json"),
        "dataset": manifest.digest,
    }


def scores(
    config: Config, found: Sequence[Weights], evaluator: Evaluator, *, folder: RunFolder, dataset: str
) -> Iterator[tuple[Weights, Score]]:
    """Each candidate with its score, as they are known."""
    how = storage.digest(storage.relative_uris(_scored_by(config, load_manifest(dataset)), folder.root), 12)
    places = [storage.join(folder.selection, how, f"{each.digest}.json") for each in found]
    missing = []
    for number, (weights, place) in enumerate(zip(found, places, strict=True)):
        if (known := storage.find_json(place)) is not None:
            yield weights, known
        else:
            missing.append(number)
    settings = config.select
    sampling = config.sampling.model_copy(update={"seed": settings.seed})
    candidates = [(found[number].uri, sampling) for number in missing]
    made = sample_features(config, candidates, dataset=dataset, num_images=settings.num_images)
    # Where the config has a number of each class, `sample_features` takes the classes in turn.
    in_turn = (config.data.num_classes or 1) if isinstance(sampling.label, dict) else classes_in_turn(config)
    for index, features in made:
        score = _score(features, evaluator, figure=settings.figure, in_turn=in_turn)
        storage.write_json(places[missing[index]], score)
        yield found[missing[index]], score


def _score(features: Features | None, evaluator: Evaluator, *, figure: str, in_turn: int) -> Score:
    """`value` with its 95 % interval, `low` and `high`, and what comparisons need; None without features.

    That is what is `compared`, the value or the log of a Fréchet distance, and the same `without_group` of the
    jackknife, for each. The samples show `in_turn` classes in turn.
    """
    if features is None:
        return dict.fromkeys(("value", "low", "high", "compared", "without_group"))
    known = evaluator.reference
    if figure == "fid":
        without = frechet_without(groups_of(features, classes_in_turn=in_turn), known.statistics)
        center = math.log(max(evaluator.distance(features), np.finfo(float).tiny))
    else:
        center, without = kernel_distances(features, known.features, seed=COMMON_SEED, classes_in_turn=in_turn)
    reach = DEVIATIONS * jackknife_deviation(without)
    value, low, high = (math.exp(end) if figure == "fid" else end for end in (center, center - reach, center + reach))
    return {"value": value, "low": low, "high": high, "compared": center, "without_group": without.tolist()}


def _surely_below(one: Score, other: Score, *, among: int) -> bool:
    """Whether one score is lower by more than chance explains where this is one `among` so many comparisons."""
    if other["value"] is None:
        return True
    without = np.subtract(one["without_group"], other["without_group"])  # of the same noise, group by group
    reach = t.ppf(1 - SURE / 2 / among, len(without) - 1) * jackknife_deviation(without)
    return bool(one["compared"] + reach < other["compared"])


def conclude(
    config: Config, found: Sequence[Weights], scored: Mapping[str, Score], *, folder: RunFolder, extractor: str
) -> SelectResult:
    """Choose, copy the best candidates, and write the table and its plot."""
    settings = config.select
    rows = [{**asdict(each), **scored[each.digest]} for each in found]
    finite = [row for row in rows if row["value"] is not None]
    if not finite:
        wrong = f"all {len(rows)} candidates give images that are not finite"
        raise UserError("sampling.sampler", wrong, hint="lower its step size")
    metric = metric_name(settings.figure, extractor=extractor, num_images=settings.num_images)
    last = max(rows, key=lambda row: row["images_seen"])
    better = [row for row in finite if row is not last and _surely_below(row, last, among=len(finite) - 1)]
    better.sort(key=lambda row: (row["value"], row["images_seen"]))
    kept = [keep_copy(row["uri"], folder.selected) for row in better[:KEPT]]
    chosen, *_ = *better, last
    sentence, notes = f"none of {len(rows)} candidates is surely better than the last, which stays", list[str]()
    if better:
        seen = f"{chosen['images_seen']:,} images"
        sentence = f"{metric} is {shown_score(chosen)} at {seen}, the last's {shown_score(last)}"
        optimistic = f"{metric} chose among {len(rows)} candidates, so the winning score is optimistic"
        notes = [f"{optimistic}; the metrics use new samples", *filter(None, [few_samples(metric)])]
    result = SelectResult(
        uri=storage.join(folder.selection, "candidates.json"),
        plot=storage.join(folder.selection, "candidates.png"),
        checkpoint=kept[0] if kept else last["uri"],
        sentence=sentence,
        figure=metric,
        value=chosen["value"],
        images_seen=chosen["images_seen"],
        candidates=rows,
        kept=kept,
        notes=notes,
    )
    storage.write_json(result.uri, storage.relative_uris(asdict(result), folder.root), indent=1)
    storage.write_bytes(result.plot, to_png(selection_figure(rows, metric=metric, chosen=chosen)))
    return result
