"""Preview images of a training."""

from __future__ import annotations

import io
import logging

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ncsn.config import Config
from ncsn.core.images import DataMoments, image_grid
from ncsn.core.samplers.settings import DpmSolver
from ncsn.core.training import EVALUATIONS_PER_STEP, TrainState
from ncsn.errors import InvalidValue
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.classes import BALANCED
from ncsn.model.generate import generate

SHARE = 0.01  # of the training time that previews may take
MOST_EVALUATIONS, LEAST_EVALUATIONS = 20, 5
PIXELS = 256  # wanted side of the picture; small images are enlarged by whole factors

_logger = logging.getLogger(__name__)


def preview_png(*, config: Config, state: TrainState, moments: DataMoments) -> bytes | None:
    """A few images from the present weights as a PNG file; None if there is no time for them."""
    evaluations = preview_evaluations(config)
    if not evaluations:
        return None
    try:
        picture = preview(config, state, moments, evaluations=evaluations)
    except InvalidValue as error:  # early weights may not make finite images yet
        _logger.warning("no preview at images_seen = %d: %s", state.images_seen, error)
        return None
    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, format="PNG")
    return buffer.getvalue()


def preview_evaluations(config: Config) -> int:
    """NFE of a preview image, as many as fit in `SHARE` of the time between two checkpoints; 0 for no preview."""
    images = config.tracking.preview_images
    if not images or config.levels.num_levels == 1:
        return 0
    images = sum(map(len, preview_rows(config)))
    # The other workers wait while rank 0 makes the preview.
    between = min(config.train.checkpoint_every_images, config.train.num_images) / config.compute.max_workers
    affordable = int(SHARE * EVALUATIONS_PER_STEP * between / images)
    wanted = min(affordable, MOST_EVALUATIONS, config.levels.num_levels)
    return wanted if wanted >= min(LEAST_EVALUATIONS, config.levels.num_levels) else 0


def preview_rows(config: Config) -> list[NDArray[np.int64]]:
    """Numbers of the images of the preview; a row for each class if the network knows some, but not too many."""
    count, num_classes = config.tracking.preview_images, config.data.num_classes
    if num_classes is None or num_classes > count:
        return [np.arange(count)]
    # Balanced images have the classes in turn.
    return list(np.arange(-(-count // num_classes) * num_classes).reshape(-1, num_classes).T)


def preview(config: Config, state: TrainState, moments: DataMoments, *, evaluations: int) -> NDArray[np.uint8]:
    """Images 0, 1, ... of the seed of `config.sampling` from the EMA weights, as one picture `[H, W, C]` uint8.

    Draws from no generator, so that training goes on as without it.

    Raises:
        UserError: An image is not finite.
    """
    network, rows = state.averaged(), preview_rows(config)
    sampler = DpmSolver(num_levels=max(2, evaluations), spacing="geometric")
    images = generate(
        TrainedNetwork(config=config, network=network, moments=moments),
        sampling=config.sampling.model_copy(update={"sampler": sampler, "label": BALANCED, "guidance": None}),
        first=0,
        count=sum(map(len, rows)),
        device=next(network.parameters()).device,
    )
    columns = len(rows[0]) if len(rows) > 1 else round(len(images) ** 0.5)
    grid = image_grid(images[np.concatenate(rows)], columns=columns)
    factor = max(1, PIXELS // max(grid.shape[:2]))
    return grid.repeat(factor, axis=0).repeat(factor, axis=1)
