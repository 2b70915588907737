"""Averages of the weights of other relative widths, put together from the snapshots of a run: `ncsn ema`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ncsn.config import Config
from ncsn.config.training import WIDEST
from ncsn.errors import UserError
from ncsn.model.averages import POOR, build_average
from ncsn.steps.step import Step

OPTION = "--relative-width"


@dataclass(frozen=True)
class EmaResult:
    """The averages that were put together."""

    checkpoints: list[str]  # URIs to sample from, one for each width
    averages: list[dict[str, Any]]  # relative_width, images_seen, error of the weight profile, coefficients
    notes: list[str] = field(default_factory=list)  # for people


def run(
    config: Config, *, run: str, checkpoint: str, relative_widths: Sequence[float], at_images: int | None = None
) -> EmaResult:
    """Put one average together for each relative width, which ends at the checkpoint or after `at_images` images.

    A relative width is the standard deviation of the weights over time, as a share of the training so far. Averages
    that are there already stay.
    """
    step = Step.claim("ema", config, run, EmaResult, unit="averages")
    for width in relative_widths:
        if not 0 < width <= WIDEST:
            raise UserError(OPTION, f"out of range: more than 0 and at most {WIDEST}", value=width)
    inputs = {"checkpoint": checkpoint, "relative_widths": list(relative_widths), "at_images": at_images}
    if result := step.found(inputs, needs=lambda result: result.checkpoints):
        return result
    built = []
    with step.timed() as progress:
        for number, width in enumerate(relative_widths, 1):
            built.append(build_average(checkpoint, config, relative_width=width, at_images=at_images, key=OPTION))
            progress(number, len(relative_widths))
    poor = [f"{each.relative_width:g}" for each in built if each.error > POOR]
    note = f"the snapshots are too few for the widths {', '.join(poor)}: their weights over time are others"
    return step.done(
        EmaResult(
            checkpoints=[each.uri for each in built],
            averages=[asdict(each) for each in built],
            notes=[note] if poor else [],
        )
    )
