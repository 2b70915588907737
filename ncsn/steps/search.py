"""Between ingest and training, if asked: a search for better settings on Ray Tune, scored by samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ncsn import storage
from ncsn.config import Config, from_yaml, to_yaml
from ncsn.config.load import NOT_OF_MODELS
from ncsn.config.search import EPSILON, rungs, variant
from ncsn.config.training import ema_setting
from ncsn.data.format import Manifest, load_manifest
from ncsn.distributed.cluster import ray_cluster, ray_tags, require_resources
from ncsn.distributed.ray_calls import runner_of
from ncsn.distributed.search import search
from ncsn.distributed.trials import SearchPlan, TrialRecord, read_trials
from ncsn.errors import UserError
from ncsn.evaluation import evaluation_of
from ncsn.evaluation.reference import open_evaluator
from ncsn.progress import Progress
from ncsn.report.plots import epsilon_versus_quality, search_coordinates, to_png
from ncsn.runs.layout import run_folder
from ncsn.runs.metrics import metric_name
from ncsn.runs.results import SearchResult
from ncsn.runs.run import Run
from ncsn.runs.steps import BEST
from ncsn.steps.address import keep_guide
from ncsn.steps.prepared import Context, Prepared
from ncsn.steps.train import Start, require_classes, settle_noise, start_of
from ncsn.tracking.mlflow_runs import StepRun

_logger = logging.getLogger(__name__)


def prepare(run: Run, *, dataset: str) -> Search:
    """What the trials train, and how they are scored. What the search finds is trained under another name."""
    folder = run.folder
    best_run = run_folder(run.config, f"{run.name}{BEST}").run  # a name belongs to one config, and the best is another
    manifest = load_manifest(dataset)
    config = settle_noise(run, manifest)
    # Trials that grew would take the resources of those that wait.
    compute = config.compute.model_copy(update={"num_workers": config.compute.min_workers})
    config = keep_guide(config.model_copy(update={"compute": compute}), folder)
    require_classes(config, manifest, dataset)
    assert config.search is not None
    scored_by = {
        "dataset": dataset,
        "rungs": rungs(config),
        "evaluation": evaluation_of(config, manifest).model_dump(mode="json"),
        "sampling": config.sampling.model_dump(mode="json", exclude={"num_images", "batch_size", "seed"}),
        **config.search.model_dump(mode="json", include={"num_samples", "epsilons", "seed"}),
    }
    # Trials that are scored alike share a folder: a search with more of them reuses those of an earlier one.
    trials = storage.join(folder.search, "trials", storage.digest(storage.relative_uris(scored_by, folder.root), 12))
    start = start_of(config, folder, manifest)
    plan = SearchPlan(config=config, dataset=dataset, trials=trials, start=start.uri)
    plan.samplings(plan.baseline)  # raises now what every trial would find
    untrained = config.train.averaging.untrained_share(plan.rungs[0], batch_size=config.train.batch_size)
    if untrained > 0.1 and not config.train.init_from:
        said = f"the EMA is still {untrained:.0%} untrained weights, so it says little"
        hint = f"lower {ema_setting(config.train)}, or raise train.num_images"
        _logger.warning("at the first rung, %d images, %s; %s", plan.rungs[0], said, hint)
    key = {"trials": plan.trials, "search": plan.settings.model_dump(mode="json")}
    return Search(config, key, plan, manifest, start, best_run)


@dataclass(frozen=True)
class Search(Prepared[SearchResult]):
    """Searches, or goes on with a search; when the launcher's heartbeat stops, its results so far are kept."""

    plan: SearchPlan
    manifest: Manifest
    start: Start
    best_run: str  # name for the run that trains what is found

    def work(self, context: Context) -> SearchResult:
        tracked = context.tracked
        with ray_cluster(self.config, last_lines=context.last_lines):
            require_resources(self.config)
            dataset = {"dataset.digest": self.manifest.digest, "dataset.uri": self.plan.dataset}
            tracked.set_tags({**ray_tags(), **self.start.tags, **dataset})
            evaluator = open_evaluator(self.config, self.plan.dataset, runner=runner_of(self.config.compute))
            objective = metric_name("fid", extractor=evaluator.name, num_images=self.plan.settings.num_samples)
            follower = _Follower(context.progress, tracked, self.plan, objective)
            search(self.plan, follower.tell)
        uri = context.folder.search
        accidents = follower.accidents
        trials = read_trials(self.plan.trials, last_rung=self.plan.rungs[-1])
        for trial in trials:
            follower.close(trial)  # also those of earlier attempts, which may have been killed in between
        best = best_trial(trials, accidents=accidents)
        rung = best.rungs[-1]
        plots = {storage.join(uri, name): png for name, png in pictures(trials, best, objective).items()}
        for place, png in plots.items():
            storage.write_bytes(place, png)
        result = SearchResult(
            uri=uri,
            config=storage.join(uri, "best.yaml"),
            run=self.best_run,
            table=storage.join(uri, "trials.json"),
            plots=list(plots),
            objective_name=objective,
            objective=rung.objective,
            baseline=baseline_objective(self.plan, trials, images_seen=rung.images_seen),
            values=best.values,
            sampler=rung.sampler,
            images_seen=rung.images_seen,
            trials=table(trials, accidents=accidents),
        )
        everything = {"objective": objective, "best": best.number, "trials": [asdict(trial) for trial in trials]}
        storage.write_json(result.table, storage.relative_uris(everything, context.folder.root), indent=1)
        before = "" if result.baseline is None else f"; the config it started from: {result.baseline:.4g}"
        header = (
            f"# Trial {best.number} of {len(trials)} found by `ncsn search`: {objective} = "
            f"{rung.objective:.4g} at {rung.images_seen:,} training images{before}\n"
        )
        chosen = variant(variant(self.config, best.values), {"sampling.sampler": rung.sampler})
        storage.write_text(result.config, header + to_yaml(chosen))
        tracked.log_metrics({objective: result.objective}, result.images_seen)
        for uri in (result.config, result.table, *result.plots):
            tracked.log_file(uri)
        return result


def trainable(result: SearchResult, config: Config) -> Config:
    """The best config, to be trained where `config` says: the search may have been on another machine or moved."""
    best = from_yaml(storage.read_text(result.config), origin=result.config, without=NOT_OF_MODELS)
    sampling = best.sampling.model_copy(update={"guidance": config.sampling.guidance})  # not by the search's copy
    images = {name: getattr(config.data, name) for name in ("root", "download")}
    ours = {name: getattr(config, name) for name in NOT_OF_MODELS if name != "search" and "." not in name}
    data = best.data.model_copy(update=images)
    return best.model_copy(update={**ours, "sampling": sampling, "data": data, "export": config.export})


class _Follower:
    """Brings what happens in a search to MLflow, each trial as a run below the step's, and to the progress."""

    def __init__(self, progress: Progress, tracked: StepRun, plan: SearchPlan, objective: str) -> None:
        self._progress, self._tracked, self._plan, self.objective = progress, tracked, plan, objective
        self._runs: dict[str, tuple[StepRun, set[int]]] = {}  # run and its logged rungs, by the trial's URI
        self._closed: set[str] = set()
        self.accidents: dict[str, str] = {}  # what ended a trial from outside, by its URI
        progress.start(plan.settings.num_trials, "trials")

    def tell(self, trial: TrialRecord, over: bool, error: str | None) -> None:  # noqa: FBT001 - as of `search`
        if not over:
            self._log(trial)
            self._progress.check_lease()
            return
        if error is not None:
            self.accidents[trial.uri] = error
        self.close(trial)
        trials = read_trials(self._plan.trials, last_rung=self._plan.rungs[-1])
        ended = sum(trial.status != "unfinished" or trial.uri in self.accidents for trial in trials)
        self._progress.advance(ended - self._progress.done)

    def close(self, trial: TrialRecord) -> None:
        run = self._log(trial)
        if trial.uri not in self._closed:
            reason = trial.failure or self.accidents.get(trial.uri)
            run.set_tags({"search.status": trial.status} | ({"search.reason": reason} if reason else {}))
            run.client.set_terminated(run.run_id, "FAILED" if reason else "FINISHED")
            self._closed.add(trial.uri)

    def _log(self, trial: TrialRecord) -> StepRun:
        if trial.uri not in self._runs:
            run = self._tracked.nested(f"trial-{trial.number:03d}", key=trial.uri, params=trial.values)
            known = run.client.get_metric_history(run.run_id, self.objective)
            self._runs[trial.uri] = run, {metric.step for metric in known}
        run, logged = self._runs[trial.uri]
        for rung in trial.rungs:
            if rung.images_seen not in logged:
                found = {"train/loss": rung.loss, "sample/epsilon": rung.sampler.get("epsilon")}
                found[self.objective] = rung.objective
                run.log_metrics({name: each for name, each in found.items() if each is not None}, rung.images_seen)
                logged.add(rung.images_seen)
        return run


def best_trial(trials: Sequence[TrialRecord], *, accidents: Mapping[str, str]) -> TrialRecord:
    """Of the trials that got furthest the one with the least objective, the earlier one of equals."""
    sound = [trial for trial in trials if trial.failure is None and trial.rungs]
    if not sound:
        reasons = [trial.failure or accidents.get(trial.uri) or "it reached no rung" for trial in trials]
        reason = f"all {len(trials)} trials failed; the first: {reasons[0].strip().splitlines()[-1]}"
        raise UserError("search.space", reason, hint="narrow it to settings that train")
    return min(sound, key=lambda trial: (-trial.rungs[-1].images_seen, trial.rungs[-1].objective, trial.number))


def baseline_objective(plan: SearchPlan, trials: Sequence[TrialRecord], *, images_seen: int) -> float | None:
    """What the config as it stands, with its own sampler, reached at that many images; None if it failed."""
    sampler = asdict(plan.config.sampling.sampler)
    tried = (
        scored.objective
        for trial in trials
        for rung in trial.rungs
        for scored in rung.sweep
        if trial.values == plan.baseline and rung.images_seen == images_seen and scored.sampler == sampler
    )
    return next(tried, None)


def table(trials: Sequence[TrialRecord], *, accidents: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row of plain values per trial, in the order in which they were started."""
    last = [trial.rungs[-1] if trial.rungs else None for trial in trials]
    return [
        {
            "trial": trial.number,
            "values": trial.values,
            "status": trial.status,
            "images_seen": rung.images_seen if rung else 0,
            "objective": rung.objective if rung else None,
            "sampler": rung.sampler if rung else None,
            "seconds": round(sum(rung.seconds for rung in trial.rungs), 1),
            "reason": trial.failure or accidents.get(trial.uri, ""),
        }
        for trial, rung in zip(trials, last, strict=True)
    ]


def pictures(trials: Sequence[TrialRecord], best: TrialRecord, objective: str) -> dict[str, bytes]:
    """All trials as parallel coordinates: settings, how far, how good; and of the best what each epsilon reached."""
    settings = {path: [trial.values[path] for trial in trials] for path in best.values}
    last = [trial.rungs[-1] if trial.rungs else None for trial in trials]
    has_epsilon = "epsilon" in best.rungs[-1].sampler
    if has_epsilon:
        settings[EPSILON] = [rung.sampler["epsilon"] if rung else math.nan for rung in last]
    settings["images seen"] = [rung.images_seen if rung else math.nan for rung in last]
    quality = [
        rung.objective if rung and trial.failure is None else math.nan for trial, rung in zip(trials, last, strict=True)
    ]
    found = {"coordinates.png": to_png(search_coordinates(settings, quality, quality_label=objective))}
    if has_epsilon:
        figure = epsilon_versus_quality(
            [scored.sampler["epsilon"] for scored in best.rungs[-1].sweep],
            [math.nan if scored.objective is None else scored.objective for scored in best.rungs[-1].sweep],
            quality_label=objective,
            chosen=best.rungs[-1].sampler["epsilon"],
        )
        found["epsilon.png"] = to_png(figure)
    return found
