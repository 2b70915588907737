"""By how much the loss of held-out images exceeds that of training images, and when that is an alarm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SIGNIFICANT = 4.0  # standard errors
HARMFUL = 0.05  # share of the held-out loss
FEWEST_IMAGES = 5  # of each set, for a standard error


@dataclass(frozen=True)
class Alarm:
    """Noise levels at which the held-out loss is above the training loss by more than chance explains."""

    bins: tuple[int, ...]
    harmful: bool  # whether the gap also is a harmful share of the loss


@dataclass(frozen=True)
class Gaps:
    """Held-out losses, and by how much they exceed those of training images, at S noise levels."""

    held_out: Array  # [S]
    gap: Array  # [S]
    error: Array  # standard error of the gap [S]; NaN if it is unknown

    @classmethod
    def of(cls, held_out: Array, training: Array) -> Gaps:
        """From the losses of N held-out images [S, N] and of M training images [S, M]."""
        gap, sets = held_out.mean(axis=1) - training.mean(axis=1), (held_out, training)
        error = np.full(len(gap), np.nan)
        if min(losses.shape[1] for losses in sets) >= FEWEST_IMAGES:
            error = np.sqrt(sum(losses.var(axis=1, ddof=1) / losses.shape[1] for losses in sets))
        return cls(held_out.mean(axis=1), gap, error)

    def alarm(self) -> Alarm | None:
        """The alarm, if two neighboring levels, or the only one, have a significant gap."""
        significant = self.gap > SIGNIFICANT * self.error
        for harmful, found in ((True, significant & (self.gap > HARMFUL * self.held_out)), (False, significant)):
            beside = np.zeros(len(found), np.bool_)
            beside[1:] |= found[:-1]
            beside[:-1] |= found[1:]
            if bins := np.flatnonzero(found & (beside | (len(found) == 1))).tolist():
                return Alarm(tuple(bins), harmful)
        return None
