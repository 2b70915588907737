"""Pictures of a finished run: losses, levels, inpainting, interpolation, neighbours, and quality over NFE.

Not a step of the pipeline: it reads what the pipeline left, and can be asked for at any time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ncsn import storage
from ncsn.config import Config
from ncsn.errors import UserError
from ncsn.model import checkpoint as checkpoints
from ncsn.runs.costs import Prices, prices_of, read_plan
from ncsn.runs.folder import RunFolder
from ncsn.runs.records import load_history
from ncsn.steps import figure_numbers as numbers
from ncsn.steps.figure_numbers import Subject, subject_of
from ncsn.steps.step import Step

if TYPE_CHECKING:
    from matplotlib.figure import Figure


DEFAULT_NFE = (10, 20, 50, 100)
DEFAULT_IMAGES = 256


@dataclass(frozen=True)
class FiguresResult:
    """The figures of one run.

    Attributes:
        uri: JSON file with the numbers behind all of them.
        figures: Name -> PNG file; an SVG file of the same name stands beside it.
        notes: What is missing, and why.
    """

    uri: str
    figures: dict[str, str]
    notes: list[str]


@dataclass
class _Sheet:
    """Figures and their numbers as they are made."""

    figures: dict[str, Figure] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def run(
    config: Config,
    *,
    run: str,
    checkpoint: str,
    samples: str,
    dataset: str,
    nfe: Sequence[int] = DEFAULT_NFE,
    num_images: int = DEFAULT_IMAGES,
    out: str | None = None,
) -> FiguresResult:
    """Draw a finished run; the second call with the same inputs returns the first's figures.

    Args:
        config: The experiment.
        run: Name of the run.
        checkpoint: URI of the checkpoint.
        samples: URI of its samples, of which the nearest training images are sought.
        dataset: URI of the ingested data set.
        nfe: Wanted evaluations per image in the curve of quality over NFE; each sampler takes the nearest it can.
        num_images: Images behind each point of that curve.
        out: URI of the folder for the files; None = `report` in the run's folder.

    Raises:
        UserError: if the checkpoint belongs to another config, or a sampler leaves the finite numbers.
    """
    step = Step.claim("figures", config, run, FiguresResult, unit="images")
    _check(nfe, num_images)
    device = "cuda" if config.compute.use_gpu and torch.cuda.is_available() else "cpu"
    trained = checkpoints.load_for_sampling(checkpoint, device=device)
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
        subject = subject_of(config, trained, samples=samples, dataset=dataset, device=device)
        sheet = _draw(subject, step.folder, nfe=nfe, num_images=num_images, progress=work.progress)
        result = _publish(sheet, out)
        for uri in (result.uri, *result.figures.values()):
            work.tracked.log_file(uri, "figures")
    return step.done(result)


def _check(nfe: Sequence[int], num_images: int) -> None:
    if not nfe or min(nfe) < 1:
        raise UserError("--nfe", "must be numbers of evaluations per image, each at least 1", value=list(nfe))
    if num_images < 2:
        raise UserError("--num-images", "must be at least 2, since a single image has no spread", value=num_images)


def _draw(
    subject: Subject, folder: RunFolder, *, nfe: Sequence[int], num_images: int, progress: Callable[[int, int], None]
) -> _Sheet:
    sheet = _Sheet()
    _draw_losses(sheet, folder, subject)
    _draw_images(sheet, subject)
    prices = prices_of(read_plan(folder.uri))
    _draw_quality(sheet, subject, prices, nfe=nfe, num_images=num_images, progress=progress)
    return sheet


def _draw_losses(sheet: _Sheet, folder: RunFolder, subject: Subject) -> None:
    from ncsn.report.plots import LevelLosses, loss_curves, loss_heat_map, under_trained_levels

    history = load_history(folder.history)
    if not history.images_seen:
        sheet.notes.append("no curves of the loss: the run was trained before their history was kept")
        return
    sigmas = subject.sigmas.tolist()
    losses = history.level_losses(len(sigmas))
    curves = LevelLosses.of(history.images_seen, losses, sigmas=sigmas)
    sheet.figures["loss_curves"] = loss_curves(curves)
    sheet.figures["loss_map"] = loss_heat_map(curves)
    sheet.numbers["losses"] = {
        "images_seen": history.images_seen,
        "sigmas": sigmas,
        "by_level": [[value if math.isfinite(value) else None for value in row] for row in losses.tolist()],
        "under_trained_levels": under_trained_levels(curves.last),
    }


def _draw_images(sheet: _Sheet, subject: Subject) -> None:
    from ncsn.report.images import (
        MAX_STAGES,
        inpainting_panel,
        interpolation_panel,
        neighbours_panel,
        samples_at_levels,
    )

    levels = numbers.levels(subject, most=MAX_STAGES)
    sheet.figures["levels"] = samples_at_levels(levels.frames, sigmas=levels.sigmas)
    sheet.numbers["levels"] = {"stages": levels.stages, "sigmas": levels.sigmas}
    inpainted = numbers.inpainting(subject)
    sheet.figures["inpainting"] = inpainting_panel(inpainted.originals, inpainted.completions, mask=inpainted.known)
    sheet.numbers["inpainting"] = inpainted.facts
    interpolated = numbers.interpolations(subject)
    sheet.figures["interpolation"] = interpolation_panel(interpolated)
    steps = np.diff(interpolated / 255.0, axis=1)
    sheet.numbers["interpolation"] = {
        "rms_of_steps": np.sqrt((steps**2).mean(axis=(2, 3, 4))).round(4).tolist(),
    }
    for space in ("pixels", "features"):
        found = numbers.neighbours(subject, space=space)
        sheet.figures[f"neighbours_{space}"] = neighbours_panel(
            found.samples, found.neighbours, distances=found.distances, memorised=found.memorised
        )
        sheet.numbers[f"neighbours_{space}"] = found.facts


def _draw_quality(
    sheet: _Sheet,
    subject: Subject,
    prices: Prices,
    *,
    nfe: Sequence[int],
    num_images: int,
    progress: Callable[[int, int], None],
) -> None:
    from ncsn.report.diagnostics import money_note, quality_plot

    measured = numbers.quality(subject, nfe=nfe, num_images=num_images, progress=progress)
    sheet.figures["quality_nfe"] = quality_plot(measured, prices)
    sheet.numbers["quality"] = measured
    note = money_note(measured, prices)
    sheet.notes.append(f"beside each point of quality_nfe: seconds per 1,000 images on this machine, and money. {note}")


def _publish(sheet: _Sheet, out: str) -> FiguresResult:
    from ncsn.report.style import to_png, to_svg

    for name, figure in sheet.figures.items():
        storage.write_bytes(storage.join(out, f"{name}.png"), to_png(figure))
        storage.write_text(storage.join(out, f"{name}.svg"), to_svg(figure, salt=name))
    result = FiguresResult(
        uri=storage.join(out, "figures.json"),
        figures={name: storage.join(out, f"{name}.png") for name in sheet.figures},
        notes=sheet.notes,
    )
    storage.write_text(result.uri, json.dumps({"notes": sheet.notes, **sheet.numbers}, indent=1))
    return result
