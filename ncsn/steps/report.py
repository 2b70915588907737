"""Step 6: one self-contained HTML page about the run.

`ncsn figures` makes them for any model, and where it has, its numbers are taken. For a model so small that it takes
seconds, such as the demo's, the report makes them itself, over fewer images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ncsn import storage
from ncsn.config import Config, to_yaml
from ncsn.data.format import Manifest, load_manifest
from ncsn.data.shards import read_samples
from ncsn.data.training_images import open_cache
from ncsn.model import build
from ncsn.model import checkpoint as checkpoints
from ncsn.model.checkpoint import SamplingCheckpoint
from ncsn.model.generate import evaluations_per_image
from ncsn.report.diagnostics import (
    Facts,
    average_hints,
    extractor_phrase,
    lead,
    linear_loss,
    quality_panel,
    sampler_hints,
    tiles,
    training_panel,
)
from ncsn.report.html import look, render
from ncsn.report.images import film, inpainting_panel, neighbours
from ncsn.report.page import Fact, Figures, Film, Neighbour, Page, Picture, Scores, Timing, search_panel, tag_facts
from ncsn.report.style import to_png
from ncsn.report.words import cost_facts, read_figures, result_line, score_rows
from ncsn.runs.costs import Prices, ledger, prices_of, read_plan
from ncsn.runs.folder import STEPS, RunFolder
from ncsn.runs.records import load_history
from ncsn.steps import figure_numbers as numbers
from ncsn.steps.figure_numbers import subject_of
from ncsn.steps.sample import LEVELS
from ncsn.steps.step import Step
from ncsn.tracking.mlflow_runs import RecordedRun, StepRun, step_runs, whole_run

SMALL_WORK = 1e12
"""Evaluations x parameters x pixels of all panels together: some five seconds on two cores."""
FIGURES = "figures.json"
"""Where `ncsn figures` leaves its numbers, in the folder of the report."""
QUICK_NFE = (10, 40)
QUICK_IMAGES = 64
COMPLETED = numbers.ROWS * numbers.COMPLETIONS


def sampled_panels(
    config: Config,
    trained: SamplingCheckpoint,
    *,
    folder: str,
    samples: str,
    dataset: str,
    prices: Prices,
    progress: Callable[[int, int], None],
) -> Iterator[Figures]:
    """The panels that there are, or that take seconds.

    Args:
        config: The experiment.
        trained: Its network.
        folder: Where `ncsn figures` leaves its numbers.
        samples: URI of the samples.
        dataset: URI of the data set.
        prices: What the images cost.
        progress: Called with (images done, images in all).
    """
    stored = storage.join(folder, FIGURES)
    if storage.exists(stored):
        drawn = storage.read_json(stored)
        yield quality_panel(drawn["quality"], prices)
        yield _inpainting(storage.read_bytes(storage.join(folder, "inpainting.png")))
    elif quick_work(config, trained) <= SMALL_WORK:
        subject = subject_of(config, trained, samples=samples, dataset=dataset, device="cpu")
        try:
            measured = numbers.quality(subject, nfe=QUICK_NFE, num_images=QUICK_IMAGES, progress=progress)
            made = numbers.inpainting(subject)
        except ValueError as error:  # a short chain may leave the finite numbers where the run's own does not
            yield Figures("Quality against cost", "", hints=[f"Not drawn: {error}."])
            return
        yield quality_panel(measured, prices)
        yield _inpainting(to_png(inpainting_panel(made.originals, made.completions, mask=made.known)))


def quick_work(config: Config, trained: SamplingCheckpoint) -> float:
    """How much it is to make both panels, in evaluations x parameters x pixels."""
    num_levels = config.levels.num_levels
    chains = 2 * sum(max(nfe, num_levels) for nfe in QUICK_NFE) * QUICK_IMAGES
    completions = COMPLETED * evaluations_per_image(config)
    parameters = sum(parameter.numel() for parameter in trained.network.parameters())
    return float(chains + completions) * parameters * config.data.image_size**2


def _inpainting(png: bytes) -> Figures:
    caption = (
        "Each row: a test image that the model has never seen, the half that it was given, and what it made of it."
    )
    return Figures(
        heading="Completing half an image",
        text="The same network, not trained for it, invents what is missing, each time in another way.",
        pictures=[
            Picture(
                png, alt="test images, their left halves, and completions", caption=caption, width=560, pixelated=False
            )
        ],
    )


REPORT = "report"
BEST = "-best"
"""Ends the name of a run that trains what the search in the run without it found."""


@dataclass(frozen=True)
class Sources:
    """Everything in the store that a report is made of.

    Attributes:
        config: The experiment, its noise levels settled.
        folder: The run's.
        checkpoint: What the samples were made with.
        evaluation: What the evaluate step wrote.
        samples: The manifest of the samples that it measured.
        manifest: Their data set's.
        records: Step -> its `result.json`, of all steps that have finished before this one.
    """

    config: Config
    folder: RunFolder
    checkpoint: SamplingCheckpoint
    evaluation: Mapping[str, Any]
    samples: Mapping[str, Any]
    manifest: Manifest
    records: Mapping[str, Mapping[str, Any]]

    @cached_property
    def sigmas(self) -> list[float]:
        """The noise levels."""
        levels: list[float] = build.sigmas(self.config).tolist()
        return levels


def read_sources(config: Config, folder: RunFolder, evaluation: str) -> Sources:
    """Read what the other steps left.

    Raises:
        NotFound: if the evaluation, its samples or its data set is gone.
        UserError: if the samples were made with a checkpoint that is damaged or of another config.
    """
    figures = storage.read_json(evaluation)
    samples = storage.read_json(storage.join(figures["samples"], "manifest.json"))
    loaded = checkpoints.load_for_sampling(samples["checkpoint"])
    return Sources(
        config=checkpoints.require_same_training(loaded.config, config, origin=samples["checkpoint"]),
        folder=folder,
        checkpoint=loaded,
        evaluation=figures,
        samples=samples,
        manifest=load_manifest(figures["dataset"]),
        records=dict(_records(folder)),
    )


def _records(folder: RunFolder) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for step in STEPS:
        uri = folder.step(step, "result.json")
        if step != REPORT and storage.exists(uri):
            yield step, storage.read_json(uri)


def make_page(sources: Sources, tracked: StepRun, *, progress: Callable[[int, int], None]) -> Page:
    """The whole report, of what there is.

    Args:
        sources: What the other steps left.
        tracked: The MLflow run of the step that asks.
        progress: Called with (images done, images in all) while images are made for it.
    """
    facts = _facts(sources)
    whole, steps = whole_run(tracked), step_runs(tracked)
    decision = facts.decision
    seconds = [record["seconds"] for record in sources.records.values()]
    finished = max((record["finished_at"] for record in sources.records.values()), default="")
    return Page(
        title=sources.config.name,
        run=sources.folder.run,
        finished_at=finished[:16].replace("T", " "),
        verdict="" if decision is None else ("champion" if decision["promoted"] else "not promoted"),
        lead=lead(facts),
        tiles=tiles(facts),
        samples=_grid(sources),
        scores=_scores(sources, facts),
        film=_film(sources),
        neighbours=_neighbours(sources),
        neighbours_text=_neighbours_text(facts),
        panels=list(_panels(sources, progress)),
        timings=_timings(sources),
        total=f"{sum(seconds):,.1f} s" if seconds else "",
        costs=list(cost_facts(ledger(sources.config, run=sources.folder.run), num_images=_images_made(sources))),
        lineage=[*_lineage(sources, whole, steps), *tag_facts([whole.tags, *(run.tags for run in steps.values())])],
        config=to_yaml(sources.config),
    )


def _facts(sources: Sources) -> Facts:
    registered = sources.records.get("register")
    return Facts(
        config=sources.config,
        manifest=sources.manifest,
        images_seen=sources.checkpoint.images_seen,
        nfe=sources.samples["nfe"],
        metrics=sources.evaluation["metrics"],
        real_metrics=sources.evaluation["real_metrics"],
        classes=len(sources.manifest.class_names) if sources.config.evaluation.extractor == "classifier" else 0,
        decision=registered["result"] if registered else None,
    )


def _grid(sources: Sources) -> Picture | None:
    uri = storage.join(sources.evaluation["samples"], "grid.png")
    if not storage.exists(uri):
        return None
    caption = f"The first images of seed {sources.samples['seed']}, none left out: all of them made by the model."
    return Picture(storage.read_bytes(uri), alt="a grid of generated images", caption=caption)


def _film(sources: Sources) -> Film | None:
    uri = storage.join(sources.evaluation["samples"], LEVELS)
    return film(storage.read_array(uri), sigmas=sources.sigmas) if storage.exists(uri) else None


def _scores(sources: Sources, facts: Facts) -> Scores:
    evaluation = sources.evaluation
    extractors = {reading.extractor for reading in read_figures(facts.metrics).values()}
    accuracy = facts.metrics.get("eval/classifier_test_accuracy")
    knows = f"; it names {accuracy:.1%} of real test images rightly" if accuracy is not None else ""
    rows, more = score_rows(facts.metrics, facts.real_metrics)
    return Scores(
        rows=rows,
        more=more,
        measured=f"{extractor_phrase(next(iter(extractors), ''))} looked at {evaluation['num_images']:,} generated and "
        f"{evaluation['num_real_images']:,} real test images{knows}. A figure means something beside that of the real "
        "ones only. These do not compare with published scores unless the extractor is the 2015 Inception graph.",
        fingerprint=evaluation["fingerprint"],
        notes=evaluation["notes"],
    )


def _neighbours(sources: Sources) -> list[Neighbour]:
    table = sources.evaluation["nearest_training_images"]
    if not table:
        return []
    count = len(table)
    images = np.concatenate(list(read_samples(sources.evaluation["samples"], num_images=count, batch_size=count)))
    training = open_cache(sources.evaluation["dataset"], sources.evaluation["reference_split"]).images
    return neighbours(table, samples=images, training_images=training)


def _neighbours_text(facts: Facts) -> str:
    found = read_figures(facts.metrics).get("memorised")
    share = (
        ""
        if found is None
        else (f" Of {found.num_images:,} samples that were checked, {found.value:.1%} are copies by that rule.")
    )
    return (
        "A sample, then the training image nearest to it by pixels, then the nearest one by what the extractor sees. "
        "A model that only repeats its training images would show the same image twice. The numbers are pixel "
        "distances to the nearest and to the next training image; if the first is under a third of the second, the "
        f"sample counts as a copy.{share}"
    )


def _panels(sources: Sources, progress: Callable[[int, int], None]) -> Iterator[Figures]:
    yield from sampled_panels(
        sources.config,
        sources.checkpoint,
        folder=sources.folder.report,
        samples=sources.evaluation["samples"],
        dataset=sources.evaluation["dataset"],
        prices=prices_of(read_plan(sources.folder.uri)),
        progress=progress,
    )
    if (found := _search(sources.folder)) is not None:
        yield found
    history, config = load_history(sources.folder.history), sources.config
    if history.images_seen:
        yield training_panel(
            history.images_seen,
            history.level_losses(len(sources.sigmas)),
            sigmas=sources.sigmas,
            linear=linear_loss(sources.checkpoint.moments, sources.sigmas),
            hints=[
                *average_hints(config.train, images_seen=sources.checkpoint.images_seen),
                *sampler_hints(config.sampling.sampler, sources.sigmas),
            ],
        )


def _search(folder: RunFolder) -> Figures | None:
    """The search in this run, or in the one whose best settings this run trains."""
    for run in (folder.run, folder.run.removesuffix(BEST)):
        uri = RunFolder(folder.root, run).step("tune", "result.json")
        if storage.exists(uri):
            result = storage.read_json(uri)["result"]
            return search_panel(result, [storage.read_bytes(plot) for plot in result["plots"]])
    return None


def _timings(sources: Sources) -> list[Timing]:
    longest = max((record["seconds"] for record in sources.records.values()), default=0) or 1
    return [
        Timing(
            step=step,
            seconds=f"{record['seconds']:,.1f} s",
            result=result_line(step, record["result"]),
            share=round(100 * record["seconds"] / longest, 1),
        )
        for step, record in sources.records.items()
    ]


def _images_made(sources: Sources) -> int:
    sampled = sources.records.get("sample")
    return sampled["result"]["num_images"] if sampled else 0


def _lineage(sources: Sources, whole: RecordedRun, steps: Mapping[str, RecordedRun]) -> Iterator[Fact]:
    yield Fact("Run", sources.folder.uri)
    yield Fact("Data set", sources.evaluation["dataset"])
    yield Fact("Data set digest", sources.manifest.digest)
    yield Fact("Licence of the data", sources.manifest.license)
    yield Fact("Checkpoint", sources.samples["checkpoint"])
    yield Fact("Digest of the weights", sources.checkpoint.digest)
    yield Fact("Samples", sources.evaluation["samples"])
    yield Fact("Evaluation", sources.evaluation["uri"])
    if registered := sources.records.get("register"):
        result = registered["result"]
        yield Fact("Registered model", f"{result['uri']} ({', '.join(result['aliases']) or 'no alias'})")
        yield Fact("Decision", result["reason"])
    yield Fact("MLflow run", whole.run_id, link=whole.page)
    yield Fact("MLflow runs of the steps", " · ".join(f"{step} {run.run_id}" for step, run in steps.items()))


FILE = "report.html"


@dataclass(frozen=True)
class ReportResult:
    """A report.

    Attributes:
        uri: The HTML file.
        size: Its bytes.
        sections: Titles of its sections.
    """

    uri: str
    size: int
    sections: list[str]


def digest_of(uri: str) -> str:
    """SHA-256 of a file; empty if there is none."""
    return hashlib.sha256(storage.read_bytes(uri)).hexdigest() if storage.exists(uri) else ""


def run(config: Config, *, run: str, evaluation: str) -> ReportResult:
    """Write `<run>/report/report.html` from what the run's other steps left, whichever of them there are.

    Args:
        config: The experiment.
        run: Name of the run.
        evaluation: URI of the evaluation that the report is about, as the evaluate step leaves it.

    Raises:
        NotFound: if there is no evaluation, or its samples are gone.
        ValueError: if the page would be too large.
        TrackingError: if MLflow does not answer.
    """
    step = Step.claim("report", config, run, ReportResult, unit="images")
    evaluation = storage.absolute(evaluation)
    sources = read_sources(config, step.folder, evaluation)
    inputs = {
        "evaluation": sources.evaluation,
        "steps": {name: record["finished_at"] for name, record in sources.records.items()},
        "config": config.model_dump(mode="json"),
        "figures": digest_of(storage.join(step.folder.report, FIGURES)),
        "look": look(),
    }
    if result := step.found(inputs, needs=lambda result: [result.uri]):
        return result
    with step.work(config) as work:
        page = make_page(sources, work.tracked, progress=work.progress)
        text = render(page)
        uri = storage.join(step.folder.report, FILE)
        storage.write_text(uri, text)
        work.tracked.log_file(uri, to_parent=True)
        work.tracked.set_tags({"report.uri": uri})
    return step.done(ReportResult(uri=uri, size=len(text.encode()), sections=page.headings))
