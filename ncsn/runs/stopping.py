"""When a training that no longer gets better stops: a function of its history alone, so that a resumed one agrees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ncsn.config import Config
from ncsn.config.training import StopConfig
from ncsn.runs.held_out import EDM_LOSS, LOSS
from ncsn.runs.records import TrainingHistory

FID = "val/fid"  # Frechet distance of a few samples


def judged_by(config: Config, judge: str) -> str:
    """Name of the curve of a value of `train.best_by` or `train.stop.by`; `train/loss` is no curve of checkpoints."""
    # Of noise levels, whose distribution the config chooses, the weight of training is the objective.
    held_out = EDM_LOSS if config.noise.training.kind == "lognormal" else LOSS
    return {"validation": held_out, "fid": FID}[judge]


@dataclass(frozen=True)
class Plateau:
    """A measurement that shows no fall for long enough."""

    figure: str  # name of the curve
    images_seen: int
    best: float  # the lowest value before, by more than the tolerance
    best_at: int  # images seen at it

    def __str__(self) -> str:
        return (
            f"stopped at {self.images_seen:,} training images: {self.figure} has not fallen for "
            f"{self.images_seen - self.best_at:,} images, from {self.best:.4g} at {self.best_at:,}"
        )


def plateau(images_seen: Sequence[int], values: Sequence[float], *, figure: str, stop: StopConfig) -> Plateau | None:
    """The first measurement at which training stops; None if it goes on.

    Args:
        images_seen: At each measurement, ascending.
        values: Measured; less is better.
        figure: Name of their curve.
        stop: The settings.
    """
    best, best_at = float("inf"), 0
    for seen, value in zip(images_seen, values, strict=True):
        if value < best * (1 - stop.tolerance):
            best, best_at = value, seen
        elif seen - best_at >= stop.patience_images:
            return Plateau(figure, seen, best, best_at)
    return None


def plateau_of(history: TrainingHistory, config: Config) -> Plateau | None:
    """The measurement at which the training of this history stops; None if it goes on."""
    if config.train.stop is None:
        return None
    figure = judged_by(config, config.train.stop.by)
    measured = [
        (seen, point[figure])
        for seen, point in zip(history.images_seen, history.points, strict=True)
        if figure in point
    ]
    if not measured:
        return None
    images_seen, values = zip(*measured, strict=True)
    return plateau(images_seen, values, figure=figure, stop=config.train.stop)
