"""Loss of images that training does not use against that of images that it uses, at several noise levels.

A network that fits the distribution has the same loss on both. One that repeats its training images has a lower loss
on these: the gap. All random draws are functions of (image, noise level), so the losses of two networks, or of one at
two times, are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn.core.keyed_random import keyed_normal
from ncsn.core.losses import Batch, DenoisingScoreMatching, ScoreFunction

Array = NDArray[np.float64]

SEED = 0  # the same for all experiments, so that all runs on a dataset are paired
MOST_BINS = 10  # noise levels
SIGNIFICANT = 4.0  # standard errors
HARMFUL = 0.05  # share of the held-out loss
FEWEST_IMAGES = 5  # of each set, for a standard error


def losses_at(
    network: ScoreFunction,
    x: Tensor,
    *,
    first: int,
    sigmas: Tensor,
    levels: Sequence[int] | None,
    stream: int,
    labels: Tensor | None = None,
) -> Tensor:
    """Normalized denoising loss of each image at each sigma, float32 [S, B]; a zero network reads 1.

    Args:
        x: Clean images [B, C, H, W] in the network's space, numbers `first .. first + B` of their set.
        sigmas: Noise standard deviations to measure at [S].
        levels: Their numbers in the network's schedule; None for a network that takes any sigma.
        stream: Of the noise at the first sigma; each further one has the next.
        labels: Class of each image, int64 [B]; None for a network without classes.
    """
    loss, size = DenoisingScoreMatching(), x[0].numel()
    conditions, rows = {} if labels is None else {"labels": labels}, []
    for number, sigma in enumerate(sigmas.to(x.device)):
        z = keyed_normal(SEED, stream=stream + number, first=first, count=len(x), size=size).view(x.shape)
        level = None if levels is None else torch.full((len(x),), levels[number], device=x.device)
        rows.append(loss(network, Batch(x, sigma.expand(len(x)), z.to(x), level, conditions=conditions)).per_image)
    return torch.stack(rows)


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
