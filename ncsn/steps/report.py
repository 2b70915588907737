"""Step 6: one self-contained HTML page about the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ncsn import storage
from ncsn.config import Config, to_yaml
from ncsn.data.format import Manifest, load_manifest
from ncsn.data.samples import read_samples
from ncsn.data.training_images import open_cache
from ncsn.model import build
from ncsn.model import checkpoint as checkpoints
from ncsn.model.checkpoint import SamplingCheckpoint
from ncsn.model.classes import AS_DATA, BALANCED
from ncsn.report import diagnostics, facts, words
from ncsn.report.diagnostics import copying_hints, held_out_section
from ncsn.report.html import look, render
from ncsn.report.images import GRID_CLASSES, neighbors
from ncsn.report.page import Fact, Neighbor, Page, Picture, Scores, Section, Timing
from ncsn.report.scores import classes_section, selection_section
from ncsn.runs.costs import spent
from ncsn.runs.curves import held_out_curves, loss_names
from ncsn.runs.folder import RunFolder
from ncsn.runs.history import load_history
from ncsn.runs.records import StepRecord, read_result, read_results
from ncsn.runs.steps import STEPS
from ncsn.steps.register import copies_beyond_chance, selection_of
from ncsn.steps.step import Step
from ncsn.tracking.mlflow_runs import StepRun, recorded_runs
from ncsn.tracking.registry import settle_guide

REPORT = "report"
FILE = "report.html"
BEST = "-best"  # ends the name of a run with the best settings of the search in the run without it


@dataclass(frozen=True)
class ReportResult:
    """The HTML file of a report, its bytes, and the names of its sections."""

    uri: str
    size: int
    sections: list[str]


def run(config: Config, *, run: str, evaluation: str) -> ReportResult:
    """Write `<run>/report/report.html` from the results of the run's other steps; some of them may be missing."""
    step = Step.claim("report", config, run, ReportResult)
    sources = Sources.read(config, step.folder, storage.absolute(evaluation))
    inputs = {
        "evaluation": sources.evaluation,
        "steps": {name: record.finished_at for name, record in sources.records.items()},
        "config": config.model_dump(mode="json"),
        "look": look(),
    }
    if (selection := read_result(step.folder, "select")) is not None:
        inputs["selection"] = selection.finished_at
    if result := step.found(inputs, needs=lambda result: [result.uri]):
        return result
    with step.work(config) as work:
        page = collect(sources, work.tracked)
        text = render(page)
        uri = storage.join(step.folder.report, FILE)
        storage.write_text(uri, text)
        work.tracked.log_file(uri, to_parent=True)
        work.tracked.set_tags({"report.uri": uri})
    return step.done(ReportResult(uri=uri, size=len(text.encode()), sections=page.headings))


@dataclass(frozen=True)
class Sources:
    """What the other steps of a run wrote."""

    config: Config  # with noise levels
    folder: RunFolder
    checkpoint: SamplingCheckpoint  # that made the samples
    evaluation: Mapping[str, Any]
    samples: Mapping[str, Any]  # their manifest
    manifest: Manifest  # of the dataset
    records: Mapping[str, StepRecord]  # of the other steps

    @classmethod
    def read(cls, config: Config, folder: RunFolder, evaluation: str) -> Sources:
        """Read everything but the images."""
        scores = storage.read_json(evaluation)
        samples = storage.read_json(storage.join(scores["samples"], "manifest.json"))
        loaded = checkpoints.load_for_sampling(samples["checkpoint"])
        config = checkpoints.require_same_training(loaded.config, config, origin=samples["checkpoint"])
        return cls(
            config=settle_guide(config, near=folder.uri),
            folder=folder,
            checkpoint=loaded,
            evaluation=scores,
            samples=samples,
            manifest=load_manifest(scores["dataset"]),
            records=read_results({step: folder for step in STEPS if step != REPORT}),
        )

    def result(self, step: str) -> Mapping[str, Any] | None:
        """The result of another step, if there is one."""
        return self.records[step].result if step in self.records else None

    @cached_property
    def sigmas(self) -> list[float]:
        """The levels that the sampler visits."""
        levels: list[float] = build.sampled_sigmas(self.config, self.config.sampling).tolist()
        return levels


def collect(sources: Sources, tracked: StepRun) -> Page:
    """The whole report."""
    config, records = sources.config, sources.records
    generated = words.read_metrics(sources.evaluation["metrics"])
    real = words.read_metrics(sources.evaluation["real_metrics"])
    decision, sampled = sources.result("register"), sources.result("sample")
    seconds = sum(record.seconds for record in records.values())
    costs = spent(config, run=sources.folder.run)
    return Page(
        title=config.name,
        run=sources.folder.run,
        finished_at=max((record.finished_at for record in records.values()), default="")[:16].replace("T", " "),
        verdict="" if decision is None else ("champion" if decision["promoted"] else "not promoted"),
        lead=words.lead(
            manifest=sources.manifest,
            num_levels=len(sources.sigmas) if config.noise.training.kind == "levels" else None,
            images_seen=sources.checkpoint.images_seen,
            nfe=sources.samples["nfe"],
            generated=generated,
            real=real,
            decision=decision,
        ),
        tiles=words.tiles(sources.samples["nfe"], generated, real),
        samples=_grid(sources),
        strip=_strip(sources),
        scores=_scores(sources, generated),
        neighbors=_neighbors(sources),
        neighbors_text=_neighbors_text(generated),
        neighbors_hints=copying_hints(generated, real, copies=copies_beyond_chance(sources.evaluation)),
        sections=list(_sections(sources)),
        timings=_timings(records),
        total=f"{seconds:,.1f} s" if records else "",
        costs=list(facts.cost_facts(costs, num_images=0 if sampled is None else sampled["num_images"])),
        lineage=list(_lineage(sources, tracked)),
        config=to_yaml(config),
    )


def _grid(sources: Sources) -> Picture | None:
    uri = storage.join(sources.evaluation["samples"], "grid.png")
    if not storage.exists(uri):
        return None
    caption = f"The first images that the model generated with seed {sources.samples['seed']}, not hand-picked."
    if names := sources.samples.get("classes"):
        label = sources.samples.get("label", BALANCED)
        several = label in (BALANCED, AS_DATA)
        shown = ", ".join(names[:GRID_CLASSES]) if several else label if label in names else names[int(label)]
        caption += f" A row for each class: {shown}." if several else f" All are of the class {shown}."
    return Picture(storage.read_bytes(uri), alt="a grid of generated images", caption=caption)


def _strip(sources: Sources) -> Picture | None:
    uri = storage.join(sources.evaluation["samples"], "strip.png")
    if not storage.exists(uri):
        return None
    caption = "One image in each row: at the start, after some of the noise levels, and finished."
    return Picture(storage.read_bytes(uri), alt="images on their way from noise", caption=caption)


def _scores(sources: Sources, generated: Mapping[str, words.Reading]) -> Scores:
    evaluation = sources.evaluation
    first = next(iter(generated.values()), words.Reading("", "", 0, 0.0))
    accuracy = evaluation["metrics"].get("eval/classifier_test_accuracy")
    accurate = f"; its accuracy on real test images is {accuracy:.1%}" if accuracy is not None else ""
    rows, more = words.score_rows(evaluation["metrics"], evaluation["real_metrics"])
    return Scores(
        rows=rows,
        more=more,
        measured=f"{words.extractor_phrase(first.extractor)} extracts the features{accurate}. The "
        f"scores compare {evaluation['num_images']:,} generated images and {evaluation['num_real_images']:,} "
        f"{words.real_images(first.split)} with {words.reference_images(first.split)}. Judge each score by that of the "
        "real images. Scores are comparable with published ones only if the extractor is the 2015 Inception network, "
        "or DINOv2 for FD-DINOv2.",
        fingerprint=evaluation["fingerprint"],
        real=words.real_images(first.split),
        notes=evaluation["notes"],
    )


def _neighbors(sources: Sources) -> list[Neighbor]:
    table = sources.evaluation["nearest_training_images"]
    if not table:
        return []
    count = len(table)
    images = np.concatenate(list(read_samples(sources.evaluation["samples"], num_images=count, batch_size=count)))
    training = open_cache(sources.evaluation["dataset"], "train").images
    return neighbors(table, samples=images, training_images=training)


def _neighbors_text(generated: Mapping[str, words.Reading]) -> str:
    found = generated.get("memorised")
    by_features = found is None or found.split == "train"  # else the features of the training images are not known
    shown = ", and the one nearest in the extractor's features" if by_features else ""
    text = (
        f"Each picture shows a sample and the training image nearest to it in pixels{shown}. A model that repeats its "
        "training images shows the same image again. The numbers are the pixel distances to the nearest and "
        "second-nearest training images. A sample counts as a copy if the first is less than a third of the second."
    )
    return text if found is None else f"{text} {words.copies_sentence(found)}"


def _sections(sources: Sources) -> Iterator[Section]:
    if (classes := sources.evaluation.get("classes")) is not None:
        yield classes_section(classes)
    if (chosen := selection_of(sources.config, sources.folder.run, sources.samples["checkpoint"])) is not None:
        yield selection_section(chosen)
    if (search := _search(sources.folder)) is not None:
        yield search
    history, config = load_history(sources.folder.history), sources.config
    if (held_out := held_out_curves(history)) is not None:
        yield held_out_section(held_out)
    if history.images_seen:
        noise = build.training_noise(config)
        bins = noise.bins.tolist()
        linear = diagnostics.linear_loss(sources.checkpoint.moments, noise.spread(16).flatten().tolist())
        yield diagnostics.training_section(
            history.images_seen,
            history.losses(loss_names(bins)),
            sigmas=bins,
            linear=linear.reshape(len(bins), -1).mean(axis=1),
            hints=[
                *diagnostics.average_hints(config.train, images_seen=sources.checkpoint.images_seen),
                *diagnostics.sampler_hints(config.sampling.sampler, sources.sigmas),
            ],
        )


def _search(folder: RunFolder) -> Section | None:
    """The search in this run, or in the one whose best settings this run trains."""
    for run in (folder.run, folder.run.removesuffix(BEST)):
        record = read_result(RunFolder(folder.root, run), "tune")
        if record is not None:
            plots = [storage.read_bytes(plot) for plot in record.result["plots"]]
            return diagnostics.search_section(record.result, plots)
    return None


def _timings(records: Mapping[str, StepRecord]) -> list[Timing]:
    longest = max((record.seconds for record in records.values()), default=0) or 1
    return [
        Timing(
            step=step,
            seconds=f"{record.seconds:,.1f} s",
            result=facts.result_line(step, record.result),
            share=round(100 * record.seconds / longest, 1),
        )
        for step, record in records.items()
    ]


def _lineage(sources: Sources, tracked: StepRun) -> Iterator[Fact]:
    whole, steps = recorded_runs(tracked.client, tracked.uri, tracked.client.get_run(tracked.parent_run_id))
    yield Fact("Run", sources.folder.uri)
    yield Fact("Dataset", sources.evaluation["dataset"])
    yield Fact("Dataset digest", sources.manifest.digest)
    yield Fact("Data license", sources.manifest.license)
    yield Fact("Checkpoint", sources.samples["checkpoint"])
    yield Fact("Weights digest", sources.checkpoint.digest)
    if (start := sources.config.train.init_from) is not None:
        yield Fact("Training started from", start)
    yield Fact("Samples", sources.evaluation["samples"])
    yield Fact("Evaluation", sources.evaluation["uri"])
    if registered := sources.result("register"):
        yield Fact("Registered model", f"{registered['uri']} ({', '.join(registered['aliases']) or 'no alias'})")
        yield Fact("Decision", registered["reason"])
    yield Fact("MLflow run", whole.run_id, link=whole.place if whole.place.startswith("http") else "")
    yield Fact("MLflow runs by step", " · ".join(f"{step} {run.run_id}" for step, run in steps.items()))
    yield from facts.tag_facts([whole.tags, *(run.tags for run in steps.values())])
