"""The loss curves while they are drawn."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ncsn.core.losses import level_sums
from ncsn.core.training import StepReport
from ncsn.distributed.worker_context import WorkerContext
from ncsn.runs.records import level_loss


class Curves:
    """Sums of the losses, by noise level, over all workers: between two reports, and between two checkpoints."""

    def __init__(self, num_levels: int, context: WorkerContext) -> None:
        self._context = context
        self._sums = torch.zeros(2, num_levels, dtype=torch.float64, device=context.device)
        self._grad_norm = torch.zeros((), dtype=torch.float64, device=context.device)
        self._started, self._images = time.perf_counter(), 0
        self._since_checkpoint = torch.zeros(2, num_levels, dtype=torch.float64)

    def add(self, level: Tensor, step: StepReport, *, images: int) -> None:
        """Take one step: this worker's levels `[B]` and losses, and the size of the global batch."""
        self._sums += torch.stack(level_sums(step.per_image, level=level, num_levels=self._sums.shape[1]))
        self._grad_norm = torch.maximum(self._grad_norm, step.grad_norm.double())
        self._images += images

    def unreported(self) -> dict[str, Any]:
        """What has been added since the last report and the last checkpoint, as JSON values. A collective call."""
        sums = self._context.sum_over_workers(self._sums.clone())
        return {
            "sums": sums.tolist(),
            "grad_norm": float(self._grad_norm),
            "since_checkpoint": self._since_checkpoint.tolist(),
        }

    def go_on_from(self, unreported: Mapping[str, Any]) -> None:
        """Take up what `unreported` gave; the sums on one worker, for they are added up over all."""
        if self._context.rank == 0:
            self._sums += torch.tensor(unreported["sums"], dtype=torch.float64, device=self._sums.device)
        self._grad_norm.fill_(unreported["grad_norm"])
        self._since_checkpoint += torch.tensor(unreported["since_checkpoint"], dtype=torch.float64)

    def take(self) -> dict[str, float]:
        """The curves' next point, and start anew. A collective call."""
        sums = self._context.sum_over_workers(self._sums.clone()).cpu()
        self._since_checkpoint += sums
        losses, counts = sums
        now = time.perf_counter()
        point = {
            "train/loss": float(losses.sum() / counts.sum()),
            "train/grad_norm_max": float(self._grad_norm),
            "train/images_per_second": self._images / (now - self._started),
        }
        width = len(str(len(losses) - 1))
        for index in counts.nonzero().flatten().tolist():
            point[level_loss(index, width)] = float(losses[index] / counts[index])
        self._sums.zero_()
        self._grad_norm.zero_()
        self._started, self._images = now, 0
        return point

    def take_checkpoint_loss(self) -> float:
        """Loss since the checkpoint before: each level counts alike, however often it was drawn."""
        losses, counts = self._since_checkpoint
        drawn = counts > 0
        mean = float((losses[drawn] / counts[drawn]).mean())
        self._since_checkpoint.zero_()
        return mean
