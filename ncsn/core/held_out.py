"""Loss of images that training does not use against that of images that it uses, at several noise levels.

A network that fits the distribution has the same loss on both. One that repeats its training images has a lower loss
on these: the gap. All random draws are functions of (image, noise level), so the losses of two networks, or of one at
two times, are paired.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ncsn.core.keyed_random import keyed_normal
from ncsn.core.losses import Batch, DenoisingScoreMatching, ScoreFunction

SEED = 0  # the same for all experiments, so that all runs on a dataset are paired
MOST_BINS = 10  # noise levels


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
