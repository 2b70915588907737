"""What training measures of its EMA weights as it goes, and whether that ends it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ncsn.config import Config
from ncsn.core.training import TrainState
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.runs.curves import FID, Plateau, judged_by, plateau_of
from ncsn.runs.history import TrainingHistory
from ncsn.training.batches import crossed
from ncsn.training.context import WorkerContext
from ncsn.training.held_out import Probe

# Fréchet distance of a few samples of the present weights; None if an image is not finite. A collective call.
Distance = Callable[[TrainedNetwork, WorkerContext], float | None]


class Validation:
    """The measurements of a training. All workers call the same methods in the same order.

    At `last_image`, where training ends, everything is measured once more.
    """

    def __init__(
        self,
        config: Config,
        *,
        probe: Probe | None,
        distance: Distance | None,
        last_image: int,
        context: WorkerContext,
    ) -> None:
        self._config, self._probe, self._distance = config, probe, distance
        self._last_image, self._context = last_image, context
        self.stopped = False  # whether `train.stop` ends the training
        self.plateau: Plateau | None = None  # why, on rank 0

    def due(self, images_seen: int) -> bool:
        """Whether something is to be measured now."""
        return self._loss_due(images_seen) or self._distance_due(images_seen)

    def _loss_due(self, images_seen: int) -> bool:
        return self._probe is not None and self._reached(images_seen, self._probe.every)

    def _distance_due(self, images_seen: int) -> bool:
        return self._distance is not None and self._reached(images_seen, self._config.train.validate_every)

    def _reached(self, images_seen: int, every: int) -> bool:
        return images_seen >= self._last_image or crossed(images_seen, self._config.train.batch_size, every)

    def measure(
        self, state: TrainState, *, dtype: torch.dtype | None, trained: Callable[[], TrainedNetwork]
    ) -> dict[str, float]:
        """What is due, as metrics `val/...` of the EMA weights. A collective call.

        The convolutions of the held-out loss compute in `dtype`; `trained` gives the network to sample from.
        """
        point: dict[str, float] = {}
        if self._probe is not None and self._loss_due(state.images_seen):
            point |= self._probe.measure(state, dtype=dtype)
        if self._distance is not None and self._distance_due(state.images_seen):
            distance = self._distance(trained(), self._context)
            point |= {} if distance is None else {FID: distance}
        return point

    def judge(self, history: TrainingHistory | None) -> None:
        """Find out whether the measurements so far end the training. A collective call; rank 0 has the history."""
        if self._config.train.stop is None:
            return
        if history is not None:
            self.plateau = plateau_of(history, self._config)
        flag = torch.tensor([float(self.plateau is not None)], device=self._context.device)
        self.stopped = float(self._context.sum_over_workers(flag)) > 0

    def loss_of_checkpoint(self, point: dict[str, float], *, training: float) -> float | None:
        """The loss by which the best checkpoint is chosen, from its point of the curves; None if not measured."""
        judge = self._config.train.best_by
        return training if judge == "training" else point.get(judged_by(self._config, judge))
