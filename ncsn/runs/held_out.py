"""The held-out loss in a run's history: names of its curves, and what they say at the end of training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ncsn.core.held_out import Gaps
from ncsn.runs.loss_names import sigma_texts
from ncsn.runs.records import TrainingHistory

Array = NDArray[np.float64]

LOSS, GAP = "val/loss", "val/gap"  # means over the noise levels, weighted as in training
EDM_LOSS = "val/loss_edm"  # their mean with the weight of Karras et al.: that objective on held-out images
# Before sigma in the name of a curve.
_LOSS, _GAP, _ERROR = "val/loss_sigma_", "val/gap_sigma_", "val/gap_error_sigma_"


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
        point[EDM_LOSS] = float(np.mean(edm * gaps.held_out))
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
