"""The curves in a run's history: their names, and the held-out loss over training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ncsn.runs.history import TrainingHistory

Array = NDArray[np.float64]

EDM_LOSS = "train/loss_edm"  # mean of the weight of Karras et al. times the normalized loss
LOSS, GAP = "val/loss", "val/gap"  # means over the noise levels, weighted as in training
HELD_OUT_EDM = "val/loss_edm"  # their mean with the weight of Karras et al.: that objective on held-out images
PREVIEW = "train/preview"  # no curve but a series of images that training made of itself

RISE = 0.01  # of the held-out loss over its lowest value; less may be the noise of the weights


def loss_names(sigmas: Sequence[float]) -> list[str]:
    """Names of the curves of the bins with these sigmas [S], with three digits or as many as tell all apart."""
    for digits in range(3, 9):
        texts = [f"{sigma:.{digits}g}" for sigma in sigmas]
        if len(set(texts)) == len(texts):
            break
    return [f"train/loss_sigma_{text}" for text in texts]


@dataclass(frozen=True)
class HeldOutCurves:
    """The held-out loss over training."""

    images_seen: Array  # of each measurement [P], P >= 1
    loss: Array  # mean over the noise levels [P]
    gap: Array  # by how much it exceeds that of training images [P]

    @property
    def lowest_at(self) -> int | None:
        """Images seen where the loss was lowest, if it has risen since."""
        lowest = int(np.argmin(self.loss))
        return int(self.images_seen[lowest]) if self.loss[-1] > (1 + RISE) * self.loss[lowest] else None


def held_out_curves(history: TrainingHistory) -> HeldOutCurves | None:
    """The curves in the history of a run; None if the held-out loss was never measured."""
    found = [
        (seen, point[LOSS], point[GAP])
        for seen, point in zip(history.images_seen, history.points, strict=True)
        if {LOSS, GAP} <= point.keys()
    ]
    return HeldOutCurves(*np.array(found, np.float64).T) if found else None
