"""What a training shows as it goes: its loss curves, the usage of the machine, and pictures."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import Protocol

import numpy as np
import psutil
import torch
from torch import Tensor

from ncsn.config import Config
from ncsn.core.images import DataMoments, eight_bit
from ncsn.core.losses import Batch
from ncsn.core.samplers.settings import DpmSolver
from ncsn.core.training import EVALUATIONS_PER_STEP, TrainState
from ncsn.data.samples import grid_png
from ncsn.errors import InvalidValue
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.classes import BALANCED
from ncsn.model.generate import generate
from ncsn.model.objective import Objective
from ncsn.runs.history import EDM_LOSS, RATE, loss_names
from ncsn.training.context import WorkerContext


class LiveSink(Protocol):
    """Receives the curves and pictures of rank 0. Must neither block nor raise."""

    def log(self, metrics: dict[str, float], images_seen: int, when: int, *, png: bytes = b"") -> None:
        """Take one point of each curve, or one preview; `when` is in milliseconds since 1970."""

    def close(self) -> object:
        """Send the remaining entries."""


def machine_usage(device: torch.device) -> dict[str, float]:
    """Load of the machine since the last call, `system/...` -> value; of GPUs only the worker's own. It takes 1 ms."""
    memory = psutil.virtual_memory()
    usage = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
        "system/worker_memory_megabytes": psutil.Process().memory_info().rss / 1e6,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        gpu = f"system/gpu_{device.index or 0}"
        usage |= {
            f"{gpu}_memory_usage_megabytes": (total - free) / 1e6,
            f"{gpu}_memory_usage_percentage": 100 * (total - free) / total,
            f"{gpu}_memory_peak_megabytes": torch.cuda.max_memory_allocated(device) / 1e6,
        }
        with suppress(Exception):  # NVIDIA's library is missing, or this is a part of a GPU
            usage[f"{gpu}_utilization_percentage"] = float(torch.cuda.utilization(device))
    return usage


class Curves:
    """Sums of the losses by bin of sigma over all workers, between two points."""

    def __init__(self, objective: Objective, context: WorkerContext) -> None:
        self._context, self._noise, self._edm = context, objective.noise, objective.edm_weight
        self._names = loss_names(self._noise.bins.tolist())
        # Rows: the normalized loss, the number of images, and, if it is known, the loss with the weight of EDM.
        shape = (2 if self._edm is None else 3, len(self._names))
        self._sums = torch.zeros(shape, dtype=torch.float64, device=context.device)
        self._grad_norm = torch.zeros((), dtype=torch.float64, device=context.device)
        self._started, self._images = time.perf_counter(), 0

    def add(self, batch: Batch, losses: Tensor, grad_norm: Tensor, *, images: int) -> None:
        """Add one step: this worker's batch, what `train_step` gave for it, and the size of the global batch."""
        rows = [losses, torch.ones_like(losses)]
        if self._edm is not None:
            rows.append(losses * self._edm(batch.sigma))
        bins = self._noise.bin_of(batch)
        member = bins[:, None] == torch.arange(len(self._names), device=bins.device)
        self._sums += torch.where(member, torch.stack(rows).to(torch.float64)[..., None], 0.0).sum(dim=-2)
        self._grad_norm = torch.maximum(self._grad_norm, grad_norm.double())
        self._images += images

    def point(self) -> dict[str, float]:
        """The means since the last point; the next begins with nothing. A collective call."""
        sums = self._context.sum_over_workers(self._sums.clone()).cpu()
        losses, counts = sums[:2]
        point = {
            "train/loss": float(losses.sum() / counts.sum()),
            "train/grad_norm_max": float(self._grad_norm),
            RATE: self._images / (time.perf_counter() - self._started),
        }
        if self._edm is not None:
            point[EDM_LOSS] = float(sums[2].sum() / counts.sum())
        for index in counts.nonzero().flatten().tolist():
            point[self._names[index]] = float(losses[index] / counts[index])
        self._sums.zero_()
        self._grad_norm.zero_()
        self._started, self._images = time.perf_counter(), 0
        return point


SHARE = 0.01  # of the time between two checkpoints that a preview may take
MOST_EVALUATIONS, LEAST_EVALUATIONS = 20, 5
PIXELS = 256  # wanted side of the picture; small images are enlarged by whole factors

_logger = logging.getLogger(__name__)


@build.without_search()
def preview_png(*, config: Config, state: TrainState, moments: DataMoments) -> bytes | None:
    """A few images from the present weights as a PNG file; None if there is no time for them.

    They are images 0, 1, ... of the seed of `config.sampling` from the EMA weights, a row for each class if the network
    knows some, but not too many. Draws from no generator, so that training goes on as without it.
    """
    count, num_classes = config.tracking.preview_images, config.data.num_classes
    if num_classes is None or num_classes > count:
        rows = [np.arange(count)]  # numbers of the images; a single row has any number of columns
    else:  # balanced images have the classes in turn
        rows = list(np.arange(-(-count // num_classes) * num_classes).reshape(-1, num_classes).T)
    total, num_levels = sum(map(len, rows)), config.levels.num_levels
    if not total or num_levels == 1:
        return None
    # The other workers wait while rank 0 makes the preview.
    between = min(config.train.checkpoint_every_images, config.train.num_images) / config.compute.max_workers
    affordable = int(SHARE * EVALUATIONS_PER_STEP * between / total)  # evaluations of the network for each image
    sampler = config.sampling.sampler
    if config.loss.learns_score:  # else other samplers do not fit
        sampler = DpmSolver(num_levels=max(2, min(affordable, MOST_EVALUATIONS, num_levels)), spacing="geometric")
        needed = min(LEAST_EVALUATIONS, num_levels)
    else:
        needed = sampler.num_evaluations(num_levels)
    if affordable < needed:
        return None
    network = state.averaged()
    try:
        images = generate(
            TrainedNetwork(config=config, network=network, moments=moments),
            sampling=config.sampling.model_copy(update={"sampler": sampler, "label": BALANCED, "guidance": None}),
            first=0,
            count=total,
            device=next(network.parameters()).device,
        )
    except InvalidValue as error:  # early weights may not make finite images yet
        _logger.warning("no preview at images_seen = %d: %s", state.images_seen, error)
        return None
    columns = len(rows[0]) if len(rows) > 1 else round(len(images) ** 0.5)
    return grid_png(eight_bit(images[np.concatenate(rows)], config.data.pixels.limits), columns=columns, pixels=PIXELS)
