"""One self-contained HTML page about the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ncsn import storage
from ncsn.config import Config, to_yaml
from ncsn.data.format import MANIFEST, Manifest, load_manifest
from ncsn.evaluation.copies import Copies
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.classes import AS_DATA, BALANCED
from ncsn.model.objective import objective_of
from ncsn.report import hints, plots
from ncsn.report.pages import LOOK, render
from ncsn.report.plots import to_svg
from ncsn.report.words import Fact, answers, cost_facts, next_step, tag_facts, terms
from ncsn.runs.history import held_out_curves, load_history, loss_names
from ncsn.runs.layout import RunFolder
from ncsn.runs.record import Finished, finished_steps, read_result, spent
from ncsn.runs.results import (
    RegisterResult,
    ReportResult,
    SampleResult,
    SearchResult,
    SelectResult,
    UtilityResult,
)
from ncsn.runs.run import Run
from ncsn.runs.steps import BEST, SEARCH, STEP_TABLE
from ncsn.steps.prepared import Context, Prepared
from ncsn.steps.register import selection_of, utility_of
from ncsn.steps.sample import open_checkpoint
from ncsn.tracking.client import page
from ncsn.tracking.mlflow_runs import PARENT, search_runs


@dataclass(frozen=True)
class ReportSources:
    """What the other steps of a run wrote."""

    config: Config  # with noise levels
    folder: RunFolder
    checkpoint: TrainedNetwork  # that made the samples
    evaluation: Mapping[str, Any]
    samples: Mapping[str, Any]  # their manifest
    manifest: Manifest  # of the dataset
    records: Mapping[str, Finished]  # of the other steps
    selection: SelectResult | None  # the choice of the checkpoint by `ncsn select`
    utility: UtilityResult | None  # what classifiers say of the images of this checkpoint


def prepare(run: Run, *, evaluation: str) -> Report:
    """The results of the run's other steps decide; some of them may be missing."""
    folder = run.folder
    measured = storage.absolute_uris(storage.read_json(storage.absolute(evaluation)), folder.root)
    samples = storage.read_json(storage.join(measured["samples"], MANIFEST))
    samples = storage.absolute_uris(samples, folder.root)
    config, loaded = open_checkpoint(run, samples["checkpoint"])
    sources = ReportSources(
        config=config,
        folder=folder,
        checkpoint=loaded,
        evaluation=measured,
        samples=samples,
        manifest=load_manifest(measured["dataset"]),
        records=finished_steps({name: folder for name in STEP_TABLE if name not in (SEARCH, ReportResult.step)}),
        selection=selection_of(config, run.name, samples["checkpoint"]),
        utility=utility_of(folder, loaded.digest, samples),
    )
    key = {
        "evaluation": measured,
        "steps": {name: record.finished_at for name, record in sources.records.items()},
        "config": config.model_dump(mode="json", exclude={"storage"}),  # which may be moved
        "look": LOOK,
        "selection": sources.selection and sources.selection.plain(),
        "utility": sources.utility and sources.utility.plain(),
    }
    return Report(config, key, sources)


@dataclass(frozen=True)
class Report(Prepared[ReportResult]):
    """Writes `<run>/report/report.html`."""

    sources: ReportSources

    def work(self, context: Context) -> ReportResult:
        tracked, evaluation = context.tracked, self.sources.evaluation
        whole = tracked.client.get_run(tracked.parent_run_id)
        run_id = whole.info.run_id
        below = search_runs(tracked.client, whole.info.experiment_id, {PARENT: run_id})
        steps = {run.data.tags["ncsn.step"]: run for run in below if "ncsn.step" in run.data.tags}  # the latest of each
        lineage = [
            Fact("Run", self.sources.folder.uri),
            Fact("Dataset", evaluation["dataset"]),
            Fact("Dataset digest", self.sources.manifest.digest),
            Fact("Data license", terms(self.sources.config.data, self.sources.manifest)),
            Fact("Checkpoint", self.sources.samples["checkpoint"]),
            Fact("Weights digest", self.sources.checkpoint.digest),
        ]
        starts = (
            ("started", self.sources.config.train.init_from),
            ("continued", self.sources.config.train.continue_from),
        )
        lineage += [Fact(f"Training {how} from", start) for how, start in starts if start is not None]
        lineage += [Fact("Samples", evaluation["samples"]), Fact("Evaluation", evaluation["uri"])]
        if (registered := read_result(self.sources.folder, RegisterResult)) is not None:
            aliases = ", ".join(registered.aliases) or "no alias"
            lineage.append(Fact("Registered model", f"{registered.uri} ({aliases})"))
        lineage += [
            Fact("MLflow run", run_id, link=page(tracked.uri, whole.info.experiment_id, run_id)),
            Fact("MLflow runs by step", " · ".join(f"{step} {run.info.run_id}" for step, run in steps.items())),
            *tag_facts([whole.data.tags, *(run.data.tags for run in steps.values())]),
        ]
        text = render("report.html.j2", **_results(self.sources), lineage=lineage, **_training(self.sources))
        uri = storage.join(context.folder.report, "report.html")
        storage.write_text(uri, text)
        tracked.parent.log_file(uri)
        tracked.set_tags({"report.uri": uri})
        return ReportResult(uri=uri, size=len(text.encode()))


def _results(sources: ReportSources) -> dict[str, Any]:
    """What was made of what in which time, how it compares with real images, and what was chosen on the way."""
    config, records, folder = sources.config, sources.records, sources.folder
    read = partial(storage.read_below, folder.root)
    evaluation, selection, utility = sources.evaluation, sources.selection, sources.utility
    sampled, registered = read_result(folder, SampleResult), read_result(folder, RegisterResult)
    pictures = {name: storage.join(evaluation["samples"], f"{name}.png") for name in ("grid", "strip")}
    any_sigma = config.noise.training.kind == "lognormal"
    caption = f"The first images that the model generated with seed {sources.samples['seed']}, not hand-picked."
    names, label = sources.samples.get("classes"), sources.samples.get("label", BALANCED)
    if names and (isinstance(label, dict) or label in (BALANCED, AS_DATA)):
        caption += f" A row for each class: {', '.join([*names, 'none'][row] for row in sources.samples['rows'])}."
    elif names:
        caption += f" All are of the class {label if label in names else names[int(label)]}."
    # The search in this run, or in the one whose best settings this run trains.
    runs = (RunFolder(folder.root, name) for name in (folder.run, folder.run.removesuffix(BEST)))
    search = next(filter(None, (read_result(each, SearchResult) for each in runs)), None)
    return {
        "title": config.name,
        "mirrored": config.data.horizontal_flip,
        "next_step": next_step(evaluation["grade"], config, folder),
        "run": folder.run,
        "finished_at": max((record.finished_at for record in records.values()), default="")[:16].replace("T", " "),
        "decision": registered,
        "manifest": sources.manifest,
        "samples": sources.samples,
        "images_seen": sources.checkpoint.images_seen,
        "strengths": "any strength" if any_sigma else f"{config.levels.num_levels} strengths",
        "loss": config.loss,
        "records": records,
        "lines": {step: str(record) for step, record in records.items()},
        "costs": list(cost_facts(spent(config, folder), num_images=sampled.num_images if sampled else 0)),
        "config": to_yaml(config),
        **{name: read(uri) if storage.exists(uri) else None for name, uri in pictures.items()},
        "grid_caption": caption,
        "real_grid": read(evaluation["real_images"]),
        "evaluation": evaluation,
        "answers": answers(evaluation, utility.sentence if utility else ""),
        "utility": utility,
        "utility_plot": None if utility is None else read(utility.plot),
        "copies": str(Copies(**evaluation["audit"]["copies"])),
        "copying_hints": hints.copying_hints(evaluation["audit"]),
        "neighbors": read(evaluation["neighbors"]),
        "confusion": read(evaluation["confusion"]) if evaluation["confusion"] else None,
        "selection": selection,
        "selection_plot": None if selection is None else read(selection.plot),
        "search": search,
        "search_plots": [] if search is None else [read(plot) for plot in search.plots],
    }


def _training(sources: ReportSources) -> dict[str, Any]:
    """The loss over training, and what it says."""
    config, history = sources.config, load_history(sources.folder.history)
    found, loss_plot, held_out_plot = list[str](), "", ""
    if (held_out := held_out_curves(history)) is not None:
        figure = plots.held_out_losses(held_out.images_seen, held_out.loss, held_out.loss - held_out.gap)
        held_out_plot = to_svg(figure, salt="held-out")
        found += hints.overfitting_hints(held_out)
    if history.images_seen:
        noise = objective_of(config).noise
        sigmas = noise.bins.tolist()
        losses = np.stack([history.curve(name) for name in loss_names(sigmas)], axis=1)  # NaN where no image had it
        loss_plot = to_svg(plots.loss_curves(history.images_seen, losses, sigmas=sigmas), salt="lines")
        if config.loss.learns_score:
            linear = hints.linear_loss(sources.checkpoint.moments, noise.spread(16).flatten().tolist())
            linear = linear.reshape(len(sigmas), -1).mean(axis=1)
            found += hints.training_hints(losses, linear=linear, sigmas=sigmas)
        found += hints.average_hints(config.train, images_seen=sources.checkpoint.images_seen)
        found += hints.sampler_hints(config.sampling.sampler, build.sigmas(config, config.sampling).tolist())
    said = "" if held_out is None else hints.held_out_conclusion(held_out)
    return {"loss_plot": loss_plot, "held_out_plot": held_out_plot, "training_hints": found, "held_out": said}
