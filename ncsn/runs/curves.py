"""The curves in a run's history: their names, what the held-out loss says, and when training stops by one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ncsn.config import Config
from ncsn.config.training import StopConfig
from ncsn.runs.gaps import Array, Gaps
from ncsn.runs.history import TrainingHistory

EDM_LOSS = "train/loss_edm"  # mean of the weight of Karras et al. times the normalized loss
LOSS, GAP = "val/loss", "val/gap"  # means over the noise levels, weighted as in training
HELD_OUT_EDM = "val/loss_edm"  # their mean with the weight of Karras et al.: that objective on held-out images
FID = "val/fid"  # Fréchet distance of a few samples
PREVIEW = "train/preview"  # no curve but a series of images that training made of itself
# Before the number of a level, or sigma, in the name of a curve.
_LEVEL, _SIGMA = "train/loss_level_", "train/loss_sigma_"
_LOSS, _GAP, _ERROR = "val/loss_sigma_", "val/gap_sigma_", "val/gap_error_sigma_"


def loss_names(config: Config, sigmas: Sequence[float]) -> list[str]:
    """Names of the curves of the bins with these sigmas [S]."""
    if config.noise.training.kind == "levels":
        return level_names(len(sigmas))
    return [f"{_SIGMA}{text}" for text in sigma_texts(sigmas)]


def loss_unit(config: Config) -> str:
    """What a curve is of: a noise level, or a bin of sigma."""
    return "level" if config.noise.training.kind == "levels" else "bin"


def level_names(num_levels: int) -> list[str]:
    """Names of the curves of all levels; the numbers have the same width, so that the names sort."""
    width = len(str(num_levels - 1))
    return [f"{_LEVEL}{level:0{width}d}" for level in range(num_levels)]


def sigma_texts(sigmas: Sequence[float]) -> list[str]:
    """Each sigma with three digits, or as many as tell all apart."""
    for digits in range(3, 9):
        texts = [f"{sigma:.{digits}g}" for sigma in sigmas]
        if len(set(texts)) == len(texts):
            break
    return texts


def held_out_point(gaps: Gaps, *, sigmas: Array, weights: Array, edm: Array | None = None) -> dict[str, float]:
    """Metrics of one measurement at noise levels `sigmas` [S]; what is not finite is left out.

    `weights` [S] are those of training, `edm` [S] those of Karras et al. if each of the levels is as probable.
    """
    share = weights / weights.sum()
    texts = sigma_texts(sigmas.tolist())
    point = {LOSS: float(share @ gaps.held_out), GAP: float(share @ gaps.gap)}
    for name, values in ((_LOSS, gaps.held_out), (_GAP, gaps.gap), (_ERROR, gaps.error)):
        point |= {f"{name}{text}": float(value) for text, value in zip(texts, values, strict=True)}
    if edm is not None:
        point[HELD_OUT_EDM] = float(np.mean(edm * gaps.held_out))
    return {name: value for name, value in point.items() if math.isfinite(value)}


@dataclass(frozen=True)
class HeldOutCurves:
    """The held-out loss over training."""

    images_seen: Array  # of each measurement [P], P >= 1
    loss: Array  # mean over the noise levels [P]
    gap: Array  # by how much it exceeds that of training images [P]
    sigmas: Array  # of the last measurement [S], descending
    last: Gaps  # of the last measurement [S]


def held_out_curves(history: TrainingHistory) -> HeldOutCurves | None:
    """The curves in the history of a run; None if the held-out loss was never measured."""
    found = [
        (seen, point)
        for seen, point in zip(history.images_seen, history.points, strict=True)
        if {LOSS, GAP} <= point.keys()
    ]
    if not found:
        return None
    last = found[-1][1]
    texts = [name.removeprefix(_GAP) for name in last if name.startswith(_GAP)]
    held_out, gap, error = (
        np.array([last.get(f"{name}{text}", math.nan) for text in texts]) for name in (_LOSS, _GAP, _ERROR)
    )
    return HeldOutCurves(
        images_seen=np.array([seen for seen, _ in found], np.float64),
        loss=np.array([point[LOSS] for _, point in found]),
        gap=np.array([point[GAP] for _, point in found]),
        sigmas=np.array([float(text) for text in texts]),
        last=Gaps(held_out, gap, error),
    )


def judged_by(config: Config, judge: str) -> str:
    """Name of the curve of a value of `train.best_by` or `train.stop.by`; `train/loss` is no curve of checkpoints."""
    # Of noise levels, whose distribution the config chooses, the weight of training is the objective.
    held_out = HELD_OUT_EDM if config.noise.training.kind == "lognormal" else LOSS
    return {"validation": held_out, "fid": FID}[judge]


@dataclass(frozen=True)
class Plateau:
    """A measurement that shows no fall for long enough."""

    metric: str  # name of the curve
    images_seen: int
    best: float  # the lowest value before, by more than the tolerance
    best_at: int  # images seen at it

    def __str__(self) -> str:
        return (
            f"stopped at {self.images_seen:,} training images: {self.metric} has not fallen for "
            f"{self.images_seen - self.best_at:,} images, from {self.best:.4g} at {self.best_at:,}"
        )


def plateau(images_seen: Sequence[int], values: Sequence[float], *, metric: str, stop: StopConfig) -> Plateau | None:
    """The first of the measured `values`, less is better, at which training stops; None if it goes on."""
    # A function of the history alone, so that a resumed training agrees.
    best, best_at = float("inf"), 0
    for seen, value in zip(images_seen, values, strict=True):
        if value < best * (1 - stop.tolerance):
            best, best_at = value, seen
        elif seen - best_at >= stop.patience_images:
            return Plateau(metric, seen, best, best_at)
    return None


def plateau_of(history: TrainingHistory, config: Config) -> Plateau | None:
    """The measurement at which the training of this history stops; None if it goes on."""
    if config.train.stop is None:
        return None
    metric = judged_by(config, config.train.stop.by)
    pairs = zip(history.images_seen, history.points, strict=True)
    measured = [(seen, point[metric]) for seen, point in pairs if metric in point]
    images_seen, values = zip(*measured, strict=True) if measured else ((), ())
    return plateau(images_seen, values, metric=metric, stop=config.train.stop)
