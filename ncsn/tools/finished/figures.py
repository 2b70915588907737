"""`ncsn figures`: losses, levels, inpainting, interpolation, neighbors, and quality over NFE of a finished run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ncsn import storage
from ncsn.config import Config
from ncsn.data.samples import read_samples
from ncsn.errors import UserError
from ncsn.evaluation.reference import device_of
from ncsn.evaluation.scores import nearest_neighbors
from ncsn.model import build
from ncsn.model import checkpoint as checkpoints
from ncsn.model.averages import sampled_checkpoint
from ncsn.model.generate import generate, interpolate, level_images
from ncsn.report.diagnostics import price_note, quality_plot
from ncsn.report.finished_run import FinishedRun, inpainting, open_run, quality
from ncsn.report.images import MAX_STAGES, Stages, interpolation_panel, neighbors_panel, samples_at_levels
from ncsn.report.plots import last_losses, loss_curves, loss_heat_map, under_trained_levels
from ncsn.report.style import to_png, to_svg
from ncsn.runs.costs import prices_of, read_plan
from ncsn.runs.curves import loss_names, loss_unit
from ncsn.runs.history import load_history
from ncsn.steps.step import Step
from ncsn.tracking.registry import settle_guide

DEFAULT_NFE = (10, 20, 50, 100)
DEFAULT_IMAGES = 256
ROWS = 8  # samples in a panel
NEIGHBORS = 5
INTERPOLATIONS = 4
INTERPOLATED = 8  # images of each interpolation, with both ends
_POINTS_SHOW = "each point of quality_nfe shows the seconds and the price of 1,000 images on this machine."


@dataclass(frozen=True)
class FiguresResult:
    """The figures of one run."""

    uri: str  # JSON file with the numbers behind all figures
    figures: dict[str, str]  # name -> PNG file; there is an SVG file of the same name
    notes: list[str]


def run(
    config: Config,
    *,
    run: str,
    checkpoint: str,
    samples: str,
    dataset: str,
    nfe: Sequence[int] = DEFAULT_NFE,  # of the plot of quality over NFE; each sampler takes the nearest it can have
    num_images: int = DEFAULT_IMAGES,  # at each point of that plot
    out: str | None = None,  # folder for the files; None is `report` in the run's folder
) -> FiguresResult:
    """Draw a finished run; a second call with the same inputs returns the figures of the first."""
    step = Step.claim("figures", config, run, FiguresResult, unit="images")
    if not nfe or min(nfe) < 1:
        raise UserError("--nfe", "must be numbers of evaluations per image, each at least 1", value=list(nfe))
    if num_images < 2:
        raise UserError("--num-images", "must be at least 2, since a single image has no spread", value=num_images)
    device = device_of(config)
    trained = checkpoints.load_for_sampling(sampled_checkpoint(checkpoint, config), device=device)
    config = checkpoints.require_same_training(trained.config, config, origin=checkpoint)
    out = storage.absolute(out) if out else step.folder.report
    inputs = {
        "checkpoint": checkpoint,
        "samples": samples,
        "dataset": dataset,
        "nfe": sorted(set(nfe)),
        "num_images": num_images,
        "out": out,
        "sampling": config.sampling.model_dump(mode="json"),
        "evaluation": config.evaluation.model_dump(mode="json"),
    }
    if result := step.found(inputs, needs=lambda result: [result.uri, *result.figures.values()]):
        return result
    with step.work(config) as work:
        settled = settle_guide(config, near=step.folder.uri)
        opened = open_run(settled, trained, samples=samples, dataset=dataset, device=device)
        sheet = _Sheet()
        _draw_losses(sheet, opened, history=step.folder.history)
        _draw_images(sheet, opened)
        measured = quality(opened, nfe=nfe, num_images=num_images, progress=work.progress)
        prices = prices_of(read_plan(step.folder))
        sheet.figures["quality_nfe"], sheet.numbers["quality"] = quality_plot(measured, prices), measured
        sheet.notes.append(f"{_POINTS_SHOW} {price_note(measured, prices)}")
        result = _publish(sheet, out)
        for uri in (result.uri, *result.figures.values()):
            work.tracked.log_file(uri, "figures")
    return step.done(result)


@dataclass
class _Sheet:
    figures: dict[str, Figure] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _draw_losses(sheet: _Sheet, run: FinishedRun, *, history: str) -> None:
    config, found = run.trained.config, load_history(history)
    sigmas = build.training_noise(config).bins.tolist()
    if not found.images_seen:
        sheet.notes.append("no plots of the loss: the run has no history of it")
        return
    losses = found.losses(loss_names(config, sigmas))
    sheet.figures["loss_curves"] = loss_curves(found.images_seen, losses, sigmas=sigmas)
    sheet.figures["loss_map"] = loss_heat_map(found.images_seen, losses, sigmas=sigmas, unit=loss_unit(config))
    sheet.numbers["losses"] = {
        "images_seen": found.images_seen,
        "sigmas": sigmas,
        "by_level": [[value if math.isfinite(value) else None for value in row] for row in losses.tolist()],
        "under_trained_levels": under_trained_levels(last_losses(losses)),
    }


def _draw_images(sheet: _Sheet, run: FinishedRun) -> None:
    sheet.figures["levels"], sheet.numbers["levels"] = _levels(run)
    sheet.figures["inpainting"], sheet.numbers["inpainting"] = inpainting(run)
    sheet.figures["interpolation"], sheet.numbers["interpolation"] = _interpolations(run)
    for space in ("pixels", "features"):
        name = f"neighbours_{space}"
        sheet.figures[name], sheet.numbers[name] = _neighbors(run, space)


def _levels(run: FinishedRun) -> tuple[Figure, dict[str, Any]]:
    """The first samples of the run as they are after each level."""
    stages = Stages(MAX_STAGES + 1)
    final = generate(
        run.trained,
        sampling=run.sampling,
        first=0,
        count=ROWS,
        device=run.device,
        on_level=lambda stage, x: stages.add(stage, level_images(x, run.sampling, run.trained.config)),
    )
    stages.add(stages.numbers[-1], final)
    visited = build.sampler(run.sampling.sampler).visited(run.sigmas)
    sigmas = [visited[stage - 1] for stage in stages.numbers if stage > 0]
    return samples_at_levels(stages.frames, sigmas=sigmas), {"stages": stages.numbers, "sigmas": sigmas}


def _interpolations(run: FinishedRun) -> tuple[Figure, dict[str, Any]]:
    """From each even one of the run's first samples to the odd one after it."""
    images = np.stack(
        [
            interpolate(
                run.trained, sampling=run.sampling, first=n, second=n + 1, count=INTERPOLATED, device=run.device
            )
            for n in range(0, 2 * INTERPOLATIONS, 2)
        ]
    )
    steps = np.diff(images / 255.0, axis=1)
    return interpolation_panel(images), {"rms_of_steps": np.sqrt((steps**2).mean(axis=(2, 3, 4))).round(4).tolist()}


def _neighbors(run: FinishedRun, space: str) -> tuple[Figure, dict[str, Any]]:
    """The training images nearest to the run's first samples, in pixels or in the features of the extractor."""
    samples = np.concatenate(list(read_samples(run.samples, num_images=ROWS, batch_size=ROWS)))
    if space == "pixels":
        found, unit = nearest_neighbors(samples, run.train.images, k=NEIGHBORS), "gray levels, 0 to 255"
    else:
        features = run.extractor.extract(samples).features
        found, unit = nearest_neighbors(features, run.evaluator.reference.features, k=NEIGHBORS), "features"
    each = zip(found.indices.tolist(), np.round(found.distances, 4).tolist(), found.memorized.tolist(), strict=True)
    rows = [
        {"image": image, "rows": indices, "distances": distances, "memorised": copy}
        for image, (indices, distances, copy) in enumerate(each)
    ]
    panel = neighbors_panel(
        samples, run.train.images[found.indices], distances=found.distances, memorized=found.memorized.tolist()
    )
    return panel, {"unit": unit, "samples": rows}


def _publish(sheet: _Sheet, out: str) -> FiguresResult:
    for name, figure in sheet.figures.items():
        storage.write_bytes(storage.join(out, f"{name}.png"), to_png(figure))
        storage.write_text(storage.join(out, f"{name}.svg"), to_svg(figure, salt=name))
    result = FiguresResult(
        uri=storage.join(out, "figures.json"),
        figures={name: storage.join(out, f"{name}.png") for name in sheet.figures},
        notes=sheet.notes,
    )
    storage.write_json(result.uri, {"notes": sheet.notes, **sheet.numbers}, indent=1)
    return result
