"""A few images from the weights at a checkpoint: the same noise each time, by a short deterministic sampler."""

from __future__ import annotations

import copy
import logging
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ncsn.config import Config
from ncsn.config.choices import ProbabilityFlowConfig
from ncsn.core.images import DataMoments, image_grid
from ncsn.core.training import TrainState
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.generate import generate

NAME = "train/preview"
SHARE = 0.01
"""Largest part of the training time that previews may take."""
EVALUATIONS_PER_STEP = 3
"""A training step on an image costs about three network evaluations: forward, and twice that backward."""
MOST_EVALUATIONS, LEAST_EVALUATIONS = 20, 5
PIXELS = 256
"""Wanted side of the picture; small images are enlarged by whole factors."""

_logger = logging.getLogger(__name__)


class PictureSink(Protocol):
    """Takes pictures; neither blocks nor raises."""

    def log_picture(self, picture: NDArray[np.uint8], name: str, images_seen: int) -> None:
        """Take one picture, `[H, W, C]` uint8."""


def send_preview(sink: PictureSink, *, config: Config, state: TrainState, moments: DataMoments) -> None:
    """Send a few images from the present weights, if there is time for them."""
    evaluations = preview_evaluations(config)
    if not evaluations:
        return
    try:
        picture = preview(config, state, moments, evaluations=evaluations)
    except ValueError as error:  # early weights may not make images yet; that is no fault of the training
        _logger.warning("no preview at images_seen = %d: %s", state.images_seen, error)
    else:
        sink.log_picture(picture, NAME, state.images_seen)


def preview_evaluations(config: Config) -> int:
    """NFE of a preview image, as many as fit in `SHARE` of the time between two checkpoints; 0 for no preview.

    While one worker makes the preview the others wait.
    """
    images = config.tracking.preview_images
    if not images or config.levels.num_levels == 1:
        return 0
    between = min(config.train.checkpoint_every_images, config.train.num_images) / config.compute.max_workers
    affordable = int(SHARE * EVALUATIONS_PER_STEP * between / images)
    wanted = min(affordable, MOST_EVALUATIONS, config.levels.num_levels)
    return wanted if wanted >= min(LEAST_EVALUATIONS, config.levels.num_levels) else 0


def preview(config: Config, state: TrainState, moments: DataMoments, *, evaluations: int) -> NDArray[np.uint8]:
    """Images 0, 1, ... of the seed of `config.sampling` from the EMA weights, as one picture.

    Draws from no generator, so that training goes on as without it.

    Returns:
        `[H, W, C]` uint8.

    Raises:
        UserError: if an image is not finite.
    """
    network = copy.deepcopy(state.network)
    state.ema.copy_to(network)
    network.eval()
    sampler = ProbabilityFlowConfig(kind="probability_flow", method="euler", num_levels=evaluations)
    images = generate(
        TrainedNetwork(config=config, network=network, moments=moments),
        sampling=config.sampling.model_copy(update={"sampler": sampler}),
        first=0,
        count=config.tracking.preview_images,
        device=next(network.parameters()).device,
    )
    grid = image_grid(images, columns=round(len(images) ** 0.5))
    factor = max(1, PIXELS // max(grid.shape[:2]))
    return grid.repeat(factor, axis=0).repeat(factor, axis=1)
